package spec

import (
	"bytes"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/user"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	fieldContext  = "config.linux.security_context."
	fieldUsername = fieldContext + "run_as_username"
	fieldImage    = "image config: User"
)

// maxID is the largest uid and gid: the bound of Kubernetes, below the kernel's.
const maxID = math.MaxInt32

// user decides who the first process is. A user that the CRI names replaces the
// image's USER together with its group.
func (b *builder) user() error {
	db, err := parseAccounts(b.Passwd, b.Group)
	if err != nil {
		return err
	}
	acc, err := db.find(b.sc, b.Image.User)
	if err != nil {
		return err
	}
	if g := b.sc.GetRunAsGroup(); g != nil {
		acc.gid = int(g.GetValue())
	}
	if acc.uid < 0 || acc.uid > maxID || acc.gid < 0 || acc.gid > maxID {
		return invalid(fieldImage, "uid %d or gid %d is out of range 0..%d", acc.uid, acc.gid, maxID)
	}
	groups := []uint32{}
	for _, g := range b.sc.GetSupplementalGroups() {
		groups = append(groups, uint32(g))
	}
	if b.sc.GetSupplementalGroupsPolicy() == runtimeapi.SupplementalGroupsPolicy_Merge {
		groups = append(groups, db.memberships(acc.name)...)
	}
	// The primary group is among them, as after a login, so that a process that
	// changes its gid keeps access to what the group owns.
	groups = append(groups, uint32(acc.gid))
	slices.Sort(groups)

	u := &b.spec.Process.User
	u.UID, u.GID = uint32(acc.uid), uint32(acc.gid)
	u.AdditionalGids = slices.Compact(groups)
	return nil
}

// account is an identity; name is empty if /etc/passwd has none for the uid.
type account struct {
	name     string
	uid, gid int
}

type accounts struct {
	users  []user.User
	groups []user.Group
}

func parseAccounts(passwd, group []byte) (accounts, error) {
	var db accounts
	var err error
	if db.users, err = user.ParsePasswd(bytes.NewReader(passwd)); err != nil {
		return db, invalid("image /etc/passwd", "cannot be read: %v", err)
	}
	if db.groups, err = user.ParseGroup(bytes.NewReader(group)); err != nil {
		return db, invalid("image /etc/group", "cannot be read: %v", err)
	}
	return db, nil
}

func (db accounts) find(sc *runtimeapi.LinuxContainerSecurityContext, imageUser string) (account, error) {
	if name := sc.GetRunAsUsername(); name != "" {
		acc, ok := db.byName(name)
		if !ok {
			return acc, invalid(fieldUsername, "user %q is not in the image's /etc/passwd", name)
		}
		return acc, nil
	}
	if u := sc.GetRunAsUser(); u != nil {
		return db.byID(int(u.GetValue())), nil
	}
	name, group, _ := strings.Cut(imageUser, ":")
	acc := db.byID(0)
	if id, err := strconv.Atoi(name); err == nil {
		acc = db.byID(id)
	} else if name != "" {
		var ok bool
		if acc, ok = db.byName(name); !ok {
			return acc, invalid(fieldImage, "user %q is not in the image's /etc/passwd", name)
		}
	}
	if id, err := strconv.Atoi(group); err == nil {
		acc.gid = id
	} else if group != "" {
		i := slices.IndexFunc(db.groups, func(g user.Group) bool { return g.Name == group })
		if i < 0 {
			return acc, invalid(fieldImage, "group %q is not in the image's /etc/group", group)
		}
		acc.gid = db.groups[i].Gid
	}
	return acc, nil
}

func (db accounts) byName(name string) (account, bool) {
	for _, u := range db.users {
		if u.Name == name {
			return account{u.Name, u.Uid, u.Gid}, true
		}
	}
	return account{}, false
}

// byID gives the first entry of the uid; a uid without one has the group 0.
func (db accounts) byID(uid int) account {
	for _, u := range db.users {
		if u.Uid == uid {
			return account{u.Name, u.Uid, u.Gid}
		}
	}
	return account{uid: uid}
}

func (db accounts) memberships(name string) []uint32 {
	var gids []uint32
	for _, g := range db.groups {
		if name != "" && g.Gid >= 0 && g.Gid <= maxID && slices.Contains(g.List, name) {
			gids = append(gids, uint32(g.Gid))
		}
	}
	return gids
}
