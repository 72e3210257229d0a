package pods

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/holdfast-cri/holdfast/daemon/beneath"
	"github.com/holdfast-cri/holdfast/daemon/records"
	"github.com/holdfast-cri/holdfast/daemon/state"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

// Names in the directory of a pod in STATE.
const (
	shmName   = "shm" // /dev/shm of its containers
	filesName = "etc" // what they see below /etc
	pidName   = "pid" // the pin of the pid namespace of its init
)

// Containers can write these two file systems. Each has a bound of its own, also
// on what costs no page: they must not fill the one that the node runs on.
const (
	shmSize    = 64 << 20
	shmInodes  = 1 << 16
	filesSize  = 1 << 20 // and as much as the files of the host that are copied
	maxCopied  = 16 << 20
	filesNodes = 16
)

// dir is the directory of the pod in STATE.
func (p *Pod) dir() string { return p.m.State.RunDir(state.Pods, p.ID()) }

// filesDir is where the files lie that containers see below /etc.
func (p *Pod) filesDir() string { return filepath.Join(p.dir(), filesName) }

// makeFiles writes the files that containers see below /etc unless the kubelet
// mounts its own, and mounts /dev/shm.
func (p *Pod) makeFiles(want records.Want) error {
	size := filesSize
	for _, path := range []string{hostHosts, hostResolvConf} {
		if st, err := os.Stat(path); err == nil {
			size += int(st.Size())
		}
	}
	if err := p.mountTmpfs(p.filesDir(), fmt.Sprintf("mode=0700,size=%d,nr_inodes=%d", size, filesNodes)); err != nil {
		return err
	}
	if err := p.write("hostname", want.Hostname+"\n"); err != nil {
		return err
	}
	resolv, err := p.resolvConf()
	if err != nil {
		return err
	}
	if err := p.write("resolv.conf", resolv); err != nil {
		return err
	}
	if !want.IPC {
		return nil
	}
	root := p.Record().Root()
	return p.mountTmpfs(p.shmDir(),
		fmt.Sprintf("mode=1777,size=%d,nr_inodes=%d,uid=%d,gid=%d", shmSize, shmInodes, root.UID, root.GID))
}

// write writes a file of the pod, which belongs to its root. All may read it,
// whatever the umask.
func (p *Pod) write(name, content string) error {
	path := filepath.Join(p.filesDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		return err
	}
	return errors.Join(p.own(path), os.Chmod(path, 0o644))
}

// own gives a file to root of the pod. Without a user namespace that is who made it.
func (p *Pod) own(path string) error {
	if p.Record().Userns() == nil {
		return nil
	}
	root := p.Record().Root()
	return os.Lchown(path, root.UID, root.GID)
}

func (p *Pod) resolvConf() (string, error) {
	var b strings.Builder
	dns := p.Record().Config.M.GetDnsConfig()
	for _, s := range dns.GetServers() {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	if s := dns.GetSearches(); len(s) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(s, " "))
	}
	if o := dns.GetOptions(); len(o) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(o, " "))
	}
	if b.Len() > 0 {
		return b.String(), nil
	}
	return hostFile(hostResolvConf)
}

// What pods get of the host where they bring nothing of their own.
const (
	hostHosts      = "/etc/hosts"
	hostResolvConf = "/etc/resolv.conf"
)

// hostFile reads a file of the host; one that is missing is empty.
func hostFile(path string) (string, error) {
	b, err := beneath.HostFile(path, maxCopied)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return string(b), err
}

// hostsFile writes /etc/hosts: the host's for a pod in its network.
func (p *Pod) hostsFile(hostname string) error {
	content := "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
	ips := p.Record().IPs()
	for _, ip := range ips {
		content += fmt.Sprintf("%s\t%s\n", ip, hostname)
	}
	if len(ips) == 0 {
		var err error
		if content, err = hostFile(hostHosts); err != nil {
			return kind.As(kind.Unavailable, err)
		}
		if p.Record().Namespaces.UTS != "" { // it has a name that the node does not know
			content = strings.TrimRight(content, "\n") + "\n127.0.0.1\t" + hostname + "\n"
		}
	}
	return kind.As(kind.Unavailable, p.write("hosts", content))
}

// mountTmpfs mounts a file system that containers can write, bounded by options.
func (p *Pod) mountTmpfs(path, options string) error {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return err
	}
	return p.m.Containers.Roots.Tmpfs(path, options)
}

// shmDir is where the pod's /dev/shm is mounted, unless it is the host's.
func (p *Pod) shmDir() string { return filepath.Join(p.dir(), shmName) }
