package pods

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/step"
)

// payLocked gives back those of the named things that the pod may hold, and notes
// what it still owes. None of them needs what only the creation had: each works
// from the record, or from the pod's id. The caller holds op.
func (p *Pod) payLocked(ctx context.Context, which []records.Debt) error {
	rec := p.Record()
	due := slices.DeleteFunc(slices.Clone(which), func(d records.Debt) bool { return !rec.Owes(d) })
	if len(due) == 0 {
		return nil
	}
	left, err := records.Pay(ctx, due, p.pay)
	paid := func(d records.Debt) bool { return slices.Contains(due, d) && !slices.Contains(left, d) }
	debts := rec.Debts
	if debts == nil {
		debts = records.AllDebts
	}
	debts = slices.DeleteFunc(slices.Clone(debts), paid)
	if paid(records.DebtFiles) { // and with them the copy of the record
		next := *p.Record()
		next.Debts = debts
		p.rec.Store(&next)
		return err
	}
	p.note(func(r *records.Pod) { r.Debts = debts })
	return err
}

// pay gives one thing back. It finds out whether there is anything to do.
func (p *Pod) pay(ctx context.Context, d records.Debt) error {
	rec := p.Record()
	switch d {
	case records.DebtInit:
		if init := p.Init(); init != nil {
			return init.Remove(ctx)
		}
		return nil
	case records.DebtNetwork:
		return p.detach(ctx)
	case records.DebtNamespaces:
		// A plugin that finds no namespace frees the address and leaves its rules.
		if n := rec.Network; n != nil && n.Phase != records.NetworkGone && records.ThisBoot(rec.BootID) {
			return errors.New("they are kept for the plugins, which have yet to detach the pod")
		}
		return p.m.Network.RemoveNamespaces(rec.ID)
	case records.DebtMounts:
		for _, name := range []string{shmName, filesName, pidName} {
			if err := p.m.Containers.Roots.Unmount(filepath.Join(p.dir(), name)); err != nil {
				return err
			}
		}
		return nil
	case records.DebtCgroup:
		return p.m.Cgroups.RemovePod(ctx, rec.Config.M.GetLinux().GetCgroupParent(), rec.ID)
	case records.DebtFiles:
		return p.m.State.RemoveRunDir(state.Pods, rec.ID)
	}
	return fmt.Errorf("no step pays the debt %q", d)
}

// detach runs DEL, unless it has run.
func (p *Pod) detach(ctx context.Context) error {
	n := p.Record().Network
	if n == nil || n.Phase == records.NetworkGone {
		return nil
	}
	a := n.Attachment
	if !records.ThisBoot(p.Record().BootID) {
		a.Netns = "" // of another boot: DEL frees the address all the same
	}
	// A plugin that is cut short leaves rules that its next DEL does not find.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), networkLimit)
	defer cancel()
	if err := p.m.Network.Del(ctx, a); err != nil {
		return fmt.Errorf("cannot detach %s from its network: %w", p, err)
	}
	if err := step.Reach(step.PodDetached); err != nil {
		return err
	}
	p.note(func(r *records.Pod) {
		gone := *r.Network
		gone.Phase = records.NetworkGone
		r.Network = &gone
	})
	return nil
}

// owe has the debts of a pod paid in the background, unless that is so already,
// and says for how long they have been. The record keeps them, so that the next
// start goes on with it.
func (p *Pod) owe(err error) time.Duration {
	p.m.mu.Lock()
	defer p.m.mu.Unlock()
	if !p.owing.IsZero() {
		return time.Since(p.owing)
	}
	p.owing = time.Now()
	p.m.Log.Error("cannot give back what a pod holds; trying again", "pod", p.ID(), "error", err)
	p.m.Go(p.payLater)
	return 0
}

// Owe is for the debts of a pod that was found at the start.
func (p *Pod) Owe() {
	rec := p.Record()
	stopped := rec.Phase == records.PodStopped && slices.ContainsFunc(records.StopDebts, rec.Owes)
	if rec.Phase == records.PodRemoved {
		p.m.mu.Lock()
		p.m.owed[p.ID()] = p
		p.m.mu.Unlock()
	}
	if stopped && rec.Debts != nil || rec.Phase == records.PodRemoved {
		p.owe(fmt.Errorf("it was owed when the daemon started: %v", rec.Debts))
	}
}

func (p *Pod) payLater(ctx context.Context) {
	const first, last = time.Second, 5 * time.Minute
	for wait := first; ; wait = min(2*wait, last) {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
		if p.payAgain(ctx) {
			break
		}
	}
	p.m.Log.Info("gave back the rest of what a pod held", "pod", p.ID())
}

// payAgain says whether nothing is owed any more.
func (p *Pod) payAgain(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, networkLimit)
	defer cancel()
	if err := p.op.Lock(ctx, p.String()); err != nil {
		return false
	}
	defer p.op.Unlock()
	var err error
	if p.Record().Phase == records.PodRemoved {
		err = p.erase(ctx)
	} else {
		err = p.payLocked(ctx, records.StopDebts)
	}
	if err != nil {
		p.m.Log.Warn("still cannot give back what a pod holds", "pod", p.ID(), "error", err)
		return false
	}
	p.m.mu.Lock() // while a removal waits, which may owe the rest anew
	p.owing = time.Time{}
	delete(p.m.owed, p.ID())
	p.m.mu.Unlock()
	return true
}
