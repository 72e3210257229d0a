// Package rundir is the agreement between daemon and shim as files: what lies
// in the run directory of a container, who writes it, and how it is read.
//
// The directory is STATE/containers/ID, on a tmpfs:
//
//	shim.lock    held by the shim for life (Lock, Held)
//	shim.sock    its ttrpc service (Listen, Dial)
//	shim.json    Identity, written by the shim before it says that it is ready
//	create.json  Launch: what Create was given, kept for a daemon that lost it
//	config.json  the OCI spec; the directory is also the OCI bundle
//	process.json the process of the spec, for execs
//	state.json   Status, replaced at each change
//	update.json  Update: the resources, once they were changed
//	exit.json    Exit, written once, before the process is reaped
//	shim.log     the shim's own log; runc.log: the OCI runtime's
//	init.pid     written by the OCI runtime
//	exec/ID.json Exec, one for each exec, as long as anything of it lives
//	exec/ID.sock where the shim awaits the client of a session (ListenSession)
//	criu.conf    the configuration of CRIU, for a checkpoint or a restore; criu/: its logs
//	rootfs       where the daemon mounts the container's root
//
// Every .json but config.json is a record (package record) that names its
// container. To a reader a missing
// file means "not yet" and a damaged one "unknown"; neither is a reason to kill.
// After a reboot none of them means anything; the shim puts a synced copy of
// exit.json into the durable directory that Create names.
package rundir

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/holdfast-cri/holdfast/proto/record"
)

// Names in a run directory.
const (
	LockName     = "shim.lock"
	SocketName   = "shim.sock"
	IdentityName = "shim.json"
	LaunchName   = "create.json"
	SpecName     = "config.json"
	ProcessName  = "process.json"
	StatusName   = "state.json"
	ExitName     = "exit.json"
	ShimLogName  = "shim.log"
	RuncLogName  = "runc.log"
	PidfileName  = "init.pid"
	RootfsName   = "rootfs"
	ExecsName    = "exec"

	CRIUName       = "criu"      // the directory of CRIU's logs
	CRIUConfigName = "criu.conf" // its configuration
)

// CRIUConfigAnnotation is that of a spec by which runc finds the configuration of CRIU.
const CRIUConfigAnnotation = "org.criu.config"

// SignalReappear has a shim put back what was removed of its lock, its socket,
// shim.json and state.json. One that misses nothing changes nothing.
const SignalReappear = unix.SIGHUP

// Dir is a run directory. Its base name is the container's id.
type Dir string

// ID is the container's id.
func (d Dir) ID() string { return filepath.Base(string(d)) }

// Path is the path of a name in the directory.
func (d Dir) Path(name string) string { return filepath.Join(string(d), name) }

// ExecPath is the path of a file of an exec.
func (d Dir) ExecPath(id, ext string) string { return d.Path(filepath.Join(ExecsName, id+ext)) }

// Identity is shim.json. Nonce differs between any two shim processes.
type Identity struct {
	Shim    Process `json:"shim"`
	BootID  string  `json:"bootId"`
	Nonce   string  `json:"nonce"`
	Version string  `json:"version"`
}

// Opaque is a record that the shim keeps for the daemon without reading it.
type Opaque struct {
	TypeURL string `json:"typeUrl"`
	Value   []byte `json:"value"`
}

// Runtime says how the OCI runtime of this container is called.
type Runtime struct {
	Path          string `json:"path"` // absolute, as is Root
	Root          string `json:"root"` // its --root
	SystemdCgroup bool   `json:"systemdCgroup,omitempty"`
}

// Launch is create.json: all that Create was given but the spec, which is config.json.
type Launch struct {
	RequestID    string  `json:"requestId"` // the same again is the same request
	Runtime      Runtime `json:"runtime"`
	Stdin        bool    `json:"stdin,omitempty"`
	StdinOnce    bool    `json:"stdinOnce,omitempty"`
	LogDirectory string  `json:"logDirectory,omitempty"` // absolute
	LogPath      string  `json:"logPath,omitempty"`      // below it; empty: the output is dropped
	DurableDir   string  `json:"durableDir,omitempty"`   // absolute; gets a synced copy of exit.json
	RestoreDir   string  `json:"restoreDir,omitempty"`   // absolute; what a checkpoint has saved
	Container    Opaque  `json:"container"`
	Sandbox      Opaque  `json:"sandbox"`
}

// Phase is where a container is in its life, as the shim sees it.
type Phase string

// The phases, in order. A container goes from any of them to PhaseExited.
const (
	PhaseEmpty    Phase = "empty"
	PhaseCreating Phase = "creating"
	PhaseCreated  Phase = "created"
	PhaseRunning  Phase = "running"
	PhaseExited   Phase = "exited"
)

// Stop is a stop that was asked for. KillAt counts on CLOCK_BOOTTIME.
type Stop struct {
	Signal      int           `json:"signal"`
	RequestedAt time.Time     `json:"requestedAt"`
	KillAt      time.Duration `json:"killAt"`
}

// Container is what creating it has shown. It does not change.
type Container struct {
	Terminal   bool `json:"terminal,omitempty"`
	UserNS     bool `json:"userNamespace,omitempty"`
	PrivatePID bool `json:"privatePid,omitempty"` // its processes end with its init
	// RuntimeExe is what init runs until it runs the container's program.
	RuntimeExe string `json:"runtimeExe,omitempty"`
	// Fifo says that the start of the OCI runtime would do no more than open a FIFO.
	Fifo bool `json:"fifo,omitempty"`
	// Restored says that it was made from a checkpoint: its processes have stopped (SIGSTOP)
	// until it is started.
	Restored bool `json:"restored,omitempty"`
	// CheapDelete says that the delete of the OCI runtime would do no more than
	// remove files and cgroups.
	CheapDelete bool `json:"cheapDelete,omitempty"`
}

// OOM counts the processes of the container that the OOM killer has killed.
type OOM struct {
	Base   uint64    `json:"base"`   // the kernel's counter before the first of them
	Count  uint64    `json:"count"`  // the same counter, as it was read last
	RoseAt time.Time `json:"roseAt"` // when it was last seen to have risen
}

// Event is something that happened to the container. The first one has the number 1.
type Event struct {
	Type EventType `json:"type"`
	At   time.Time `json:"at"`
}

// EventType says what has happened.
type EventType string

// The types of events. Each happens once; Exited is the last one.
const (
	EventCreated  EventType = "created"
	EventStarted  EventType = "started"
	EventOOM      EventType = "oom"
	EventStopping EventType = "stopping"
	EventExited   EventType = "exited"
)

// Exec is exec/ID.json: an exec from before the OCI runtime is asked for it until
// nothing of it is left.
type Exec struct {
	Process Process           `json:"process"`           // zero: it is being started
	Cgroups map[string]string `json:"cgroups,omitempty"` // of it and of all that comes of it
	// Ended says that the process has ended; what came of it may live on.
	Ended bool `json:"ended,omitempty"`
}

// Status is state.json.
type Status struct {
	Phase     Phase     `json:"phase"`
	Init      Process   `json:"init"`
	BootID    string    `json:"bootId"`
	CreatedAt time.Time `json:"createdAt"`
	StartedAt time.Time `json:"startedAt"`
	Stop      *Stop     `json:"stop,omitempty"`
	// StopSent says that the signal of Stop has reached init, or is not to be sent.
	// Until then the shim sends it as soon as init can take it.
	StopSent bool `json:"stopSent,omitempty"`
	// Cgroups of the container, by controller, as /proc/PID/cgroup has them; ""
	// is cgroup v2. They outlive the shim: the daemon kills by them what a dead
	// shim has left.
	Cgroups   map[string]string `json:"cgroups,omitempty"`
	Container *Container        `json:"container,omitempty"` // nil before PhaseCreated
	Seq       uint64            `json:"seq"`                 // of the last event
	Events    []Event           `json:"events,omitempty"`
	OOM       *OOM              `json:"oom,omitempty"` // nil: nothing was counted yet
	// Killed says that the shim has sent SIGKILL to the container.
	Killed bool `json:"killed,omitempty"`
	// InputClosed says that the first client with input has left, and that no other
	// one can give any (Launch.StdinOnce).
	InputClosed bool `json:"inputClosed,omitempty"`
	// Error is why create failed; the phase is exited then.
	Error string `json:"error,omitempty"`
}

// Where an exit record comes from.
const (
	SourceWaited   = "waited"   // the kernel told the parent
	SourceInferred = "inferred" // nobody could wait; Message says what is known
)

// Reasons of an exit. Kubernetes shows them.
const (
	ReasonCompleted  = "Completed"
	ReasonError      = "Error"
	ReasonOOMKilled  = "OOMKilled"
	ReasonShimDied   = "ShimDied"           // the shim was killed, the container with it
	ReasonNeverRan   = "ContainerCannotRun" // create or start failed, or it was deleted before
	ReasonStartError = "StartError"         // what the image or the command is cannot be run
	ReasonUnknown    = "Unknown"            // the machine went down and no record was durable
	CodeUnknown      = 255                  // with SourceInferred
	CodeSignalOffset = 128
)

// Exit is exit.json.
type Exit struct {
	Code      int       `json:"code"` // 128 + signal for a death by signal
	Signal    int       `json:"signal,omitempty"`
	StartedAt time.Time `json:"startedAt"` // zero: never started
	ExitedAt  time.Time `json:"exitedAt"`
	OOMKilled bool      `json:"oomKilled,omitempty"`
	Source    string    `json:"source"`
	Reason    string    `json:"reason"`
	Message   string    `json:"message,omitempty"`
}

// Lock takes shim.lock; see Lock, the function.
func (d Dir) Lock() (*os.File, error) { return Lock(d.Path(LockName)) }

// Relock is Lock for whoever knows that the run directory is its own: what is no lock
// and stands in its place is removed.
func (d Dir) Relock() (*os.File, error) {
	lock, err := d.Lock()
	if err == nil || errors.Is(err, ErrLocked) {
		return lock, err
	}
	if err := os.RemoveAll(d.Path(LockName)); err != nil {
		return nil, err
	}
	return d.Lock()
}

// Held says whether somebody holds shim.lock; see Held, the function.
func (d Dir) Held() (bool, error) { return Held(d.Path(LockName)) }

// throughFD calls f with a short path of the socket: the address of a Unix socket
// holds 107 bytes, and a run directory may be longer. The path is valid during f.
func (d Dir) throughFD(name string, f func(path string) error) error {
	dir, err := os.Open(string(d))
	if err != nil {
		return err
	}
	defer dir.Close()
	return f(fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), name))
}

// Listen listens on shim.sock. Only the holder of the lock may call it: a
// socket that a dead shim left is replaced.
func (d Dir) Listen() (*net.UnixListener, error) { return d.listen("unix", SocketName) }

// ListenSession listens on the socket of a session: exec/ID.sock, with messages
// (package session). Whoever listens removes it. socket is what DialSession takes.
func (d Dir) ListenSession(id string) (l *net.UnixListener, socket string, err error) {
	socket = filepath.Join(ExecsName, id+".sock")
	if err = os.Mkdir(d.Path(ExecsName), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, "", fmt.Errorf("cannot listen in %s: %w", d, err)
	}
	l, err = d.listen("unixpacket", socket)
	return l, socket, err
}

func (d Dir) listen(network, name string) (*net.UnixListener, error) {
	if err := os.RemoveAll(d.Path(name)); err != nil {
		return nil, fmt.Errorf("cannot listen in %s: %w", d, err)
	}
	var l *net.UnixListener
	err := d.throughFD(name, func(path string) (err error) {
		if l, err = net.ListenUnix(network, &net.UnixAddr{Name: path, Net: network}); err != nil {
			return err
		}
		// The short path means nothing later, so nobody may unlink by it.
		l.SetUnlinkOnClose(false)
		return os.Chmod(d.Path(name), 0o600)
	})
	if err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", d.Path(name), err)
	}
	return l, nil
}

// Dial connects to shim.sock. A shim that is stopped (SIGSTOP) still takes the
// connection; only its answers stay out.
func (d Dir) Dial(ctx context.Context) (net.Conn, error) { return d.dial(ctx, "unix", SocketName) }

// DialSession connects to the socket of a session.
func (d Dir) DialSession(ctx context.Context, socket string) (*net.UnixConn, error) {
	if dir, name := filepath.Split(socket); dir != ExecsName+"/" || name == "" {
		return nil, fmt.Errorf("cannot connect to the shim of %s: %q is no socket of a session", d.ID(), socket)
	}
	c, err := d.dial(ctx, "unixpacket", socket)
	if err != nil {
		return nil, err
	}
	return c.(*net.UnixConn), nil
}

func (d Dir) dial(ctx context.Context, network, name string) (net.Conn, error) {
	var c net.Conn
	err := d.throughFD(name, func(path string) (err error) {
		c, err = (&net.Dialer{}).DialContext(ctx, network, path)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("cannot connect to the shim at %s: %w", d.Path(name), err)
	}
	return c, nil
}

// ReadIdentity, ReadLaunch, ReadStatus and ReadExit read one record each. Errors
// are those of record.ReadOf: fs.ErrNotExist, record.ErrDamaged. The record of
// another container, copied there, is damaged.
func (d Dir) ReadIdentity() (r Identity, err error) { err = d.read(IdentityName, &r); return }
func (d Dir) ReadLaunch() (r Launch, err error)     { err = d.read(LaunchName, &r); return }
func (d Dir) ReadStatus() (r Status, err error)     { err = d.read(StatusName, &r); return }
func (d Dir) ReadExit() (r Exit, err error)         { err = d.read(ExitName, &r); return }

// ReadExitIn reads the exit record in any directory that is named after the
// container, such as the durable one.
func ReadExitIn(dir string) (Exit, error) { return Dir(dir).ReadExit() }

func (d Dir) read(name string, r any) error { return record.ReadOf(d.Path(name), d.ID(), r) }

func (d Dir) write(name string, r any) error { return record.WriteOf(d.Path(name), d.ID(), r, false) }

// maxSpec bounds what ReadSpec takes in. An environment has up to some MiB, of which
// JSON makes at most six times as much.
const maxSpec = 64 << 20

// ReadSpec reads the OCI spec as it lies there: JSON, but no record.
func (d Dir) ReadSpec() ([]byte, error) {
	path := d.Path(SpecName)
	b, err := record.ReadFile(path, maxSpec)
	if err != nil {
		return nil, fmt.Errorf("cannot read the spec: %w", err)
	}
	if !json.Valid(b) {
		err = fmt.Errorf("cannot read %s: %w: it is not JSON", path, record.ErrDamaged)
	}
	return b, err
}

// WriteIdentity, WriteLaunch and WriteStatus replace one record each. Only the
// shim calls them. None is synced: after a power cut they mean nothing.
func (d Dir) WriteIdentity(r Identity) error { return d.write(IdentityName, r) }
func (d Dir) WriteLaunch(r Launch) error     { return d.write(LaunchName, r) }
func (d Dir) WriteStatus(r Status) error     { return d.write(StatusName, r) }
