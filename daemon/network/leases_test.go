package network

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// host-local was killed, or the power was cut, before it had written who has an address. The
// next DEL gives that back, and waits for nobody who is at work there.
func TestAddressesOfNobody(t *testing.T) {
	needRoot(t)
	w := newWorld(t)
	w.conf("hf-nobody", "10.230.23.0/24")
	a := w.pod("a")
	w.add(a)
	dir := filepath.Join(w.dir, "leases/net-hf-nobody")
	kept := []string{"10.230.23.9", "10.230.23.x", "last_reserved_ip.9"}
	for name, content := range map[string]string{kept[0]: "another\r\neth0", kept[1]: "", kept[2]: ""} {
		check(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600))
	}
	check(t, os.Mkdir(filepath.Join(dir, "10.230.23.11"), 0o700))
	check(t, os.Symlink("/dev/null", filepath.Join(dir, "10.230.23.12")))
	kept = append(kept, "10.230.23.11", "10.230.23.12")
	nobody := []string{"10.230.23.7", "10.230.23.8", "fd00::7"}
	for _, name := range nobody {
		check(t, os.WriteFile(filepath.Join(dir, name), nil, 0o600))
	}
	exist := func(names []string) bool {
		return !slices.ContainsFunc(names, func(name string) bool {
			_, err := os.Lstat(filepath.Join(dir, name))
			return err != nil
		})
	}
	lock, err := os.Open(filepath.Join(dir, "lock"))
	check(t, err)
	defer lock.Close()
	check(t, unix.Flock(int(lock.Fd()), unix.LOCK_EX))
	if freed, err := freeNamelessIn(t.Context(), dir); err == nil || len(freed) > 0 || !exist(nobody) {
		t.Errorf("freed %v, %v, while a plugin may be writing them", freed, err)
	}
	check(t, unix.Flock(int(lock.Fd()), unix.LOCK_UN))
	w.del(a)
	for _, name := range nobody {
		if exist([]string{name}) {
			t.Errorf("nobody has %s, and it is taken", name)
		}
	}
	if !exist(kept) {
		t.Errorf("not all are left of %v", kept)
	}
	if !strings.Contains(w.log.String(), "10.230.23.7 10.230.23.8") {
		t.Error("nothing in the log")
	}
	w.removeNamespaces("a")
}
