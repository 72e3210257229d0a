package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"

	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

func setupLogs(a *app, fs *flag.FlagSet) runFunc {
	p := &logPrinter{app: a, lines: map[string]*line{}}
	follow := fs.Bool("f", false, "go on until the container has ended")
	fs.BoolVar(&p.timestamps, "t", false, "begin each line with its time")
	fs.BoolVar(&p.raw, "raw", false, "print the records as they are in the file")
	fs.Func("stream", "print `STREAM` only, stdout or stderr", func(s string) error {
		if p.stream = s; s != "stdout" && s != "stderr" {
			return errors.New("it is stdout or stderr")
		}
		return nil
	})
	return func(ctx context.Context, dir rundir.Dir, _ []string) error {
		if p.raw && (a.json || p.timestamps) {
			return usagef("logs: --raw goes with neither --json nor -t")
		}
		log, err := client.OpenLog(dir)
		if err != nil {
			return about(dir, err)
		}
		defer log.Close()
		if *follow {
			err = log.Follow(ctx, p.print)
		} else {
			err = log.Read(p.print)
		}
		if err != nil {
			return err
		}
		return errors.Join(p.end("stdout"), p.end("stderr")) // lines whose end has not come
	}
}

// logPrinter puts lines together and prints them.
type logPrinter struct {
	app        *app
	timestamps bool
	raw        bool
	stream     string
	lines      map[string]*line // by stream, while their end has not come
}

type line struct{ time, text []byte }

func (p *logPrinter) print(r client.Record) error {
	const maxLine = 4 << 20 // a longer one is printed in pieces
	switch {
	case r.Stream == "" && p.app.json:
		return json.NewEncoder(p.app.stdout).Encode(map[string]string{"unreadable": string(r.Raw)})
	case r.Stream != "" && p.stream != "" && r.Stream != p.stream:
		return nil
	case r.Stream == "" || p.raw:
		// Somebody else wrote what is not of the format, and whoever reads logs
		// wants to know.
		_, err := p.app.stdout.Write(r.Raw)
		return err
	}
	l := p.lines[r.Stream]
	if l == nil {
		l = &line{time: bytes.Clone(r.Time)}
		p.lines[r.Stream] = l
	}
	l.text = append(l.text, r.Text...)
	if r.Partial && len(l.text) < maxLine {
		return nil
	}
	return p.end(r.Stream)
}

// end prints the line of a stream, if there is one.
func (p *logPrinter) end(stream string) error {
	l := p.lines[stream]
	if l == nil {
		return nil
	}
	delete(p.lines, stream)
	if p.app.json {
		return json.NewEncoder(p.app.stdout).Encode(struct {
			Time   string `json:"time"`
			Stream string `json:"stream"`
			Log    string `json:"log"`
		}{string(l.time), stream, string(l.text)})
	}
	var out []byte
	if p.timestamps {
		out = append(append(out, l.time...), ' ')
	}
	to := map[string]io.Writer{"stdout": p.app.stdout, "stderr": p.app.stderr}[stream]
	_, err := to.Write(append(append(out, l.text...), '\n'))
	return err
}
