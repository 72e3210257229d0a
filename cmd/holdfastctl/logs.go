package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"

	"github.com/holdfast-cri/holdfast/proto/client"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

func setupLogs(a *app, fs *flag.FlagSet) runFunc {
	p := &logPrinter{app: a}
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
		// Lines whose end has not come.
		return errors.Join(p.printLine(p.lines.End("stdout")), p.printLine(p.lines.End("stderr")))
	}
}

// logPrinter prints records, or the lines that they make up.
type logPrinter struct {
	app        *app
	timestamps bool
	raw        bool
	stream     string
	lines      client.Lines
}

func (p *logPrinter) print(r client.Record) error {
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
	return p.printLine(p.lines.Add(r))
}

func (p *logPrinter) printLine(l *client.Line) error {
	switch {
	case l == nil:
		return nil
	case p.app.json:
		return json.NewEncoder(p.app.stdout).Encode(struct {
			Time   string `json:"time"`
			Stream string `json:"stream"`
			Log    string `json:"log"`
		}{string(l.Time), l.Stream, string(l.Text)})
	}
	var out []byte
	if p.timestamps {
		out = append(append(out, l.Time...), ' ')
	}
	to := map[string]io.Writer{"stdout": p.app.stdout, "stderr": p.app.stderr}[l.Stream]
	_, err := to.Write(append(append(out, l.Text...), '\n'))
	return err
}
