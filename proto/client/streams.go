package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/rundir"
)

// Process is the container's own process, as its spec has it.
func Process(dir rundir.Dir) (*specs.Process, error) {
	var spec specs.Spec
	b, err := dir.ReadSpec()
	if err == nil {
		err = json.Unmarshal(b, &spec)
	}
	if err == nil && spec.Process == nil {
		err = errors.New("it names no process")
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the container's process from %s: %w", dir.Path(rundir.SpecName), err)
	}
	return spec.Process, nil
}

// attach gives the command its streams for as long as run takes. After an error
// of run the rest of the output is dropped: the shim may keep its end open.
// When ctx ends, what has come of the output by then is all.
func (e *Exec) attach(ctx context.Context, req *proto.ExecSyncRequest, run func() error) (err error) {
	var finish []func(error)
	defer func() {
		for _, f := range finish {
			f(err)
		}
	}()
	for _, s := range []struct {
		path *string
		open func() (*os.File, func(error), error)
	}{
		{&req.StdinPath, func() (*os.File, func(error), error) { return source(e.Stdin) }},
		{&req.StdoutPath, func() (*os.File, func(error), error) { return sink(ctx, e.Stdout) }},
		{&req.StderrPath, func() (*os.File, func(error), error) { return sink(ctx, e.Stderr) }},
	} {
		file, done, err := s.open()
		if err != nil {
			return fmt.Errorf("cannot make a pipe for the command: %w", err)
		}
		*s.path = procPath(file)
		finish = append(finish, done)
	}
	return run()
}

// procPath is a name under which another process can open our descriptor.
func procPath(f *os.File) string {
	if f == nil {
		return ""
	}
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd())
}

func nothing(error) {}

// source is the end of a pipe that gives what is read from a reader. The copying
// ends with the reader, with the command, or with this process.
func source(from io.Reader) (file *os.File, finish func(error), err error) {
	if f, ok := from.(*os.File); ok || from == nil {
		return f, nothing, nil
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	go func() {
		io.Copy(w, from)
		w.Close()
	}()
	return r, func(error) { r.Close() }, nil // open until the shim has surely opened it
}

// sink is the end of a pipe whose content goes to a writer.
func sink(ctx context.Context, to io.Writer) (file *os.File, finish func(error), err error) {
	if f, ok := to.(*os.File); ok || to == nil {
		return f, nothing, nil
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		io.Copy(to, r)
	}()
	return w, func(err error) {
		w.Close()
		if err != nil {
			r.Close()
		}
		defer context.AfterFunc(ctx, func() { r.Close() })() // of a shim that does not close its end
		<-copied
		r.Close()
	}, nil
}
