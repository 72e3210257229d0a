package placement

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	godbus "github.com/godbus/dbus/v5"

	"github.com/holdfast-cri/holdfast/runc/cgroup"
)

const scopeSuffix = ".scope"

func scopeName(id string) string { return scopePrefix + "-" + id + scopeSuffix }

// systemdLimit ends a call to systemd whose caller set no deadline.
const systemdLimit = 30 * time.Second

// withSystemd connects to systemd for the time of f. The connection is a private
// one to the init process, which needs no D-Bus daemon and outlives its restart.
// One per call: nothing to keep, and nothing to repair when systemd re-executes.
func withSystemd(ctx context.Context, f func(context.Context, *dbus.Conn) error) error {
	ctx, cancel := context.WithTimeout(ctx, systemdLimit)
	defer cancel()
	conn, err := dbus.NewSystemdConnectionContext(ctx)
	if err == nil {
		defer conn.Close()
		err = f(ctx, conn)
	} else {
		err = fmt.Errorf("cannot connect to systemd at /run/systemd/private: %w", err)
	}
	// The connection closes with the context, and then often only says that.
	if cause := ctx.Err(); err != nil && cause != nil && !errors.Is(err, cause) {
		err = fmt.Errorf("%w: %w", cause, err)
	}
	return err
}

// scopeProperties of the scope of a shim, or of another process that outlives the daemon.
//
// It is in system.slice: a sibling of the daemon's service, so that no KillMode
// of that one reaches it, and within what the kubelet reserves for the system.
// Without the default dependencies, and because system.slice itself never
// stops, a shutdown does not end the shims ahead of their containers, whose
// scopes have none either: both stay until the final signal to all processes,
// and the shim records how its container ended.
func scopeProperties(description string, pid int) []dbus.Property {
	property := func(name string, value any) dbus.Property {
		return dbus.Property{Name: name, Value: godbus.MakeVariant(value)}
	}
	return []dbus.Property{
		property("Description", description),
		property("Slice", systemSlice),
		property("PIDs", []uint32{uint32(pid)}),
		property("DefaultDependencies", false),
		property("CollectMode", "inactive-or-failed"),
	}
}

func placeScope(ctx context.Context, scope, description string, pid int) error {
	err := withSystemd(ctx, func(ctx context.Context, conn *dbus.Conn) error {
		err := startScope(ctx, conn, scope, description, pid)
		if !isDBusError(err, "org.freedesktop.systemd1.UnitExists") {
			return err
		}
		// By an earlier call for the same process, or one that has ended.
		if inScope(pid, scope) {
			return nil
		}
		if err := awaitScopeEnd(ctx, conn, scope); err != nil {
			return err
		}
		return startScope(ctx, conn, scope, description, pid)
	})
	if err != nil {
		return fmt.Errorf("cannot move process %d out of the daemon's cgroup, into %s: %w", pid, scope, err)
	}
	return nil
}

func startScope(ctx context.Context, conn *dbus.Conn, scope, description string, pid int) error {
	done := make(chan string, 1) // the library sends once, maybe after we left
	_, err := conn.StartTransientUnitContext(ctx, scope, "fail", scopeProperties(description, pid), done)
	if err != nil {
		return err
	}
	select {
	case result := <-done:
		if result != "done" {
			return fmt.Errorf("systemd says that the job is %q; see: systemctl status %s", result, scope)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("systemd has not finished the job: %w", ctx.Err())
	}
}

// inScope says whether the process is in the scope already.
func inScope(pid int, scope string) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if strings.HasSuffix(strings.TrimSpace(line), "/"+scope) {
			return true
		}
	}
	return false
}

func removeScope(ctx context.Context, scope string) error {
	err := withSystemd(ctx, func(ctx context.Context, conn *dbus.Conn) error {
		return awaitScopeEnd(ctx, conn, scope)
	})
	if err != nil {
		return fmt.Errorf("cannot remove %s: %w", scope, err)
	}
	return nil
}

// awaitScopeEnd returns once systemd has let go of the scope. It ends by itself
// with its last process; only one that failed has to be told.
func awaitScopeEnd(ctx context.Context, conn *dbus.Conn, scope string) error {
	return cgroup.RetryBusy(ctx, func() error {
		// A unit that is not loaded is listed too, as inactive.
		units, err := conn.ListUnitsByNamesContext(ctx, []string{scope})
		if err != nil {
			return err
		}
		for _, u := range units {
			switch u.ActiveState {
			case "inactive":
			case "failed":
				err := conn.ResetFailedUnitContext(ctx, u.Name)
				if err != nil && !isDBusError(err, "org.freedesktop.systemd1.NoSuchUnit") {
					return err
				}
			default:
				return fmt.Errorf("%w: %s is %s", ErrBusy, u.Name, u.ActiveState)
			}
		}
		return nil
	})
}

func isDBusError(err error, name string) bool {
	var e godbus.Error
	return errors.As(err, &e) && e.Name == name
}
