package network

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"text/template"

	"github.com/holdfast-cri/holdfast/daemon/beneath"
	"github.com/holdfast-cri/holdfast/proto/record"
)

// templatedName is the file in ConfDir that a template becomes.
const templatedName = "10-holdfast-net.conflist"

// templateData is what a template can use: the names are those of containerd's
// conf_template.
type templateData struct {
	PodCIDR       string   // the first one
	PodCIDRRanges []string // all
	Routes        []string // to everywhere, by the families of these
}

// writeFromTemplate makes a CNI config of a template, where there is none that can be used.
// One that is there was made by somebody else, or for the same range: a node keeps its own.
func (n *Network) writeFromTemplate(subnets []netip.Prefix) error {
	if c, err := n.current(); err == nil {
		n.log.Debug("CNI template not used: there is a config", "network", c.list.Name, "source", c.source)
		return nil
	}
	text, err := beneath.HostFile(n.opts.ConfTemplate, maxConf)
	if err != nil {
		return fmt.Errorf("cannot read the template of a CNI config: %w", err)
	}
	t, err := template.New(filepath.Base(n.opts.ConfTemplate)).Parse(string(text))
	if err != nil {
		return fmt.Errorf("cannot use the template %s of a CNI config: %w", n.opts.ConfTemplate, err)
	}
	d := templateData{PodCIDR: subnets[0].String()}
	families := map[bool]bool{}
	for _, s := range subnets {
		d.PodCIDRRanges = append(d.PodCIDRRanges, s.String())
		if v4 := s.Addr().Is4(); !families[v4] {
			families[v4] = true
			d.Routes = append(d.Routes, map[bool]string{true: "0.0.0.0/0", false: "::/0"}[v4])
		}
	}
	var out bytes.Buffer
	if err := t.Execute(&out, d); err != nil {
		return fmt.Errorf("cannot use the template %s of a CNI config: %w", n.opts.ConfTemplate, err)
	}
	if _, err := parseConf(confFile{data: out.Bytes()}, nil); err != nil {
		return fmt.Errorf("cannot use the template %s: it does not become a CNI config: %w", n.opts.ConfTemplate, err)
	}
	path := filepath.Join(n.opts.ConfDir, templatedName)
	if err := os.MkdirAll(n.opts.ConfDir, 0o755); err != nil {
		return fmt.Errorf("cannot write a CNI config: %w", err)
	}
	// Synced: the kubelet may not send the range again.
	if err := record.ReplaceFile(path, out.Bytes(), 0o644, true); err != nil {
		return fmt.Errorf("cannot write a CNI config: %w", err)
	}
	n.log.Info("CNI config made of a template", "path", path, "ranges", d.PodCIDRRanges)
	return nil
}
