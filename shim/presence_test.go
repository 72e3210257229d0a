package shim_test

import (
	"errors"
	"io/fs"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	pb "github.com/holdfast-cri/holdfast/proto"
	"github.com/holdfast-cri/holdfast/proto/rundir"
	"github.com/holdfast-cri/holdfast/tests/must"
)

// A shim whose files were removed puts them back when it is told to, and goes on
// as if nothing had been.
func TestReappears(t *testing.T) {
	for name, damage := range map[string]func(t *testing.T, b *box) error{
		"nothing is missing": func(*testing.T, *box) error { return nil },
		"the socket is gone": func(_ *testing.T, b *box) error { return os.Remove(b.dir.Path(rundir.SocketName)) },
		"the lock is a dangling link": func(_ *testing.T, b *box) error {
			lock := b.dir.Path(rundir.LockName)
			return errors.Join(os.Remove(lock), os.Symlink("/nowhere/x", lock))
		},
		"the directory is gone": func(_ *testing.T, b *box) error { return os.RemoveAll(string(b.dir)) },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBox(t)
			cmd := b.launch()
			spec := b.spec("trap 'exit 3' TERM; while :; do sleep 0.01; done")
			if _, err := b.client.Create(b.ctx(), b.request(spec)); err != nil {
				t.Fatal(err)
			}
			b.start()
			b.conn.Close()
			must.Succeed(t, damage(t, b))
			must.Succeed(t, cmd.Process.Signal(rundir.SignalReappear))
			b.until("it can be called", func() bool {
				c, err := b.dir.Dial(b.ctx())
				if err == nil {
					c.Close()
				}
				return err == nil
			})
			b.connect()
			b.until("its files are there", func() bool { // the status comes last
				st, err := b.dir.ReadStatus()
				return err == nil && st.Phase == rundir.PhaseRunning
			})
			b.until("its lock is held", func() bool {
				held, err := b.dir.Held()
				return held && err == nil
			})
			if id, err := b.dir.ReadIdentity(); err != nil || id.Shim.PID != cmd.Process.Pid {
				t.Errorf("shim.json: %+v, %v", id, err)
			}
			stop := &pb.StopRequest{Id: b.id, Signal: uint32(unix.SIGTERM), GraceMs: 600_000}
			if _, err := b.client.Stop(b.ctx(), stop); err != nil {
				t.Fatal(err)
			}
			b.gone()
			if exit, err := b.dir.ReadExit(); err != nil || exit.Code != 3 || exit.Source != rundir.SourceWaited {
				t.Errorf("exit record: %+v, %v", exit, err)
			}
			if _, err := os.Stat(b.dir.Path(rundir.SocketName)); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("its socket: %v", err)
			}
		})
	}
}
