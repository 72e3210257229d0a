package pods

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/kind"
	"github.com/holdfast-cri/holdfast/proto/step"
)

// Stop kills the pod's containers and gives back what the pod holds, its addresses
// first of all. It may be called again after any failure, and for a pod that is
// gone.
func (m *Manager) Stop(ctx context.Context, id string) error {
	p, err := m.Find(id)
	if errors.Is(err, kind.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := p.op.Lock(ctx, p.String()); err != nil {
		return err
	}
	defer p.op.Unlock()
	if err := p.stopLocked(ctx, "StopPodSandbox"); err != nil {
		return kind.As(kind.Unavailable, fmt.Errorf("cannot stop %s: %w", p, err))
	}
	return nil
}

// stopLocked is Stop for the holder of op. who asks is for the journal.
func (p *Pod) stopLocked(ctx context.Context, who string) error {
	switch p.Record().Phase {
	case records.PodStopped, records.PodRemoved:
		return nil
	case records.PodStopping:
	default:
		p.journal(records.Stopping, time.Now(), "%s", who)
		p.note(func(r *records.Pod) { r.Phase = records.PodStopping })
	}
	if err := step.Reach(step.PodStopping); err != nil {
		return err
	}
	// From here on no creation of a container in this pod succeeds: each looks
	// at the phase before it ends. Those under way are not waited for.
	kerr := p.kill(ctx)
	if err := step.Reach(step.PodKilled); err != nil {
		return err
	}
	p.m.Plugins.StopPodSandbox(ctx, p)
	// The addresses are given back even if a container would not die.
	derr := p.payLocked(ctx, records.StopDebts)
	if derr != nil && p.owe(derr) < patience {
		kerr = errors.Join(kerr, derr) // the kubelet asks again
	}
	if kerr != nil {
		return kerr
	}
	p.note(func(r *records.Pod) { r.Phase = records.PodStopped })
	p.announce(stopped)
	meta := p.Record().Config.M.GetMetadata()
	p.m.Log.Info("pod stopped", "pod", p.ID(), "namespace", meta.GetNamespace(), "name", meta.GetName())
	return step.Reach(step.PodStopped)
}

// kill kills all containers of the pod at once and waits for their ends, and for
// that of the init last.
func (p *Pod) kill(ctx context.Context) error {
	list := p.m.Containers.Of(p.ID())
	errs := make([]error, len(list)+1)
	var wg sync.WaitGroup
	for i, c := range list {
		wg.Go(func() { errs[i] = c.Kill(ctx) })
	}
	wg.Wait()
	if init := p.Init(); init != nil {
		errs[len(list)] = init.Kill(ctx)
	}
	return errors.Join(errs...)
}

// Remove removes a pod and all its containers, running or not. It fails only while
// a container cannot be ended: what else cannot be given back is owed, and tried
// again in the background, once the record says so.
func (m *Manager) Remove(ctx context.Context, id string) error {
	p, err := m.Find(id)
	if errors.Is(err, kind.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := p.close(ctx); err != nil {
		return err
	}
	// Not under the lock: a creation may be waiting for it.
	if err := m.Claims.Await(ctx, p.ID()); err != nil {
		return err
	}
	if err := p.op.Lock(ctx, p.String()); err != nil {
		return err
	}
	defer p.op.Unlock()
	if !m.known(p) {
		return nil // another call has removed it
	}
	for _, c := range m.Containers.Of(p.ID()) {
		if err := c.Remove(ctx); err != nil {
			return err
		}
	}
	if err := p.payLocked(ctx, []records.Debt{records.DebtInit}); err != nil {
		return err
	}
	m.Plugins.RemovePodSandbox(ctx, p)
	unnoted := p.note(func(r *records.Pod) { r.Phase = records.PodRemoved })
	if err := p.erase(ctx); err != nil {
		if unnoted != nil { // the next start would serve it again
			return kind.As(kind.Unavailable, fmt.Errorf("cannot remove %s: %w", p, errors.Join(err, unnoted)))
		}
		p.eraseLater(err)
	}
	m.mu.Lock()
	delete(m.all, p.ID())
	m.mu.Unlock()
	p.announce(deleted)
	m.Claims.Release(NameOf(p.Record()).Name, p.ID())
	m.Log.Info("pod removed", "pod", p.ID())
	return nil
}

// close stops a pod that is to be removed: only a container that would not die
// keeps it from being so.
func (p *Pod) close(ctx context.Context) error {
	if err := p.op.Lock(ctx, p.String()); err != nil {
		return err
	}
	defer p.op.Unlock()
	if err := p.stopLocked(ctx, "RemovePodSandbox"); err != nil {
		p.m.Log.Warn("removing a pod that could not be stopped", "pod", p.ID(), "error", err)
	}
	return nil
}

func (m *Manager) known(p *Pod) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.all[p.ID()] == p
}

// erase gives back all that the pod holds, and then its record. The caller holds
// op, or is the only one that knows the pod.
func (p *Pod) erase(ctx context.Context) error {
	if err := p.payLocked(ctx, records.AllDebts); err != nil {
		return err
	}
	if left := p.Record().Debts; len(left) > 0 {
		return fmt.Errorf("the pod still owes %v, which a later version took: start that one again", left)
	}
	if err := step.Reach(step.PodErased); err != nil {
		return err
	}
	return p.m.State.Remove(state.Pods, p.ID())
}

// eraseLater has the rest given back in the background of a pod that nobody knows any more, or
// was ever told of: it is in no list, and its name is free. The record says so to the next
// start. err is what keeps the pod from being erased now.
func (p *Pod) eraseLater(err error) {
	if p.Record().Phase != records.PodRemoved {
		p.note(func(r *records.Pod) { r.Phase = records.PodRemoved })
	}
	p.m.mu.Lock()
	p.m.owed[p.ID()] = p
	p.m.mu.Unlock()
	p.owe(err)
}

// Undo removes all trace of a pod that nobody knows: of a creation that was cut short, or of one
// whose records are gone. What cannot be given back now is owed, and tried again in the background.
func (p *Pod) Undo(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, networkLimit)
	defer cancel()
	err := p.erase(ctx)
	if err != nil {
		p.eraseLater(err)
	}
	return err
}

// patience is for how long a debt of a stopped pod is told to the kubelet, which
// asks again. Afterwards the pod counts as stopped, or it could never be deleted
// on a node whose network plugin is gone.
const patience = time.Minute
