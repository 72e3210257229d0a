package spec

import (
	"bufio"
	"errors"
	"io"
	"io/fs"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/holdfast-cri/holdfast/daemon/beneath"
	"github.com/holdfast-cri/holdfast/proto/kind"
)

const (
	fieldContext  = "config.linux.security_context."
	fieldUsername = fieldContext + "run_as_username"
	fieldImage    = "image config: User"
)

// maxID is the largest uid and gid: the bound of Kubernetes, below the kernel's.
const maxID = math.MaxInt32

// The image's files of accounts are read line by line, so that large ones cost
// time and no memory.
const (
	maxAccounts    = 64 << 20 // bytes of a file
	maxAccountLine = 1 << 20  // bytes of a line
	maxGroups      = 65536    // the kernel's bound of the groups of a process (NGROUPS_MAX)
)

// FindUser says as whom the first process of a container runs, by the image's
// config and the /etc/passwd and /etc/group in its mounted root. A user that the
// CRI names replaces the image's USER together with its group. An error is of
// the kind kind.Invalid.
func FindUser(root string, c *runtimeapi.ContainerConfig, image ocispec.ImageConfig) (specs.User, error) {
	passwd, err := openAccounts(root, "/etc/passwd")
	if err != nil {
		return specs.User{}, err
	}
	defer passwd.Close()
	group, err := openAccounts(root, "/etc/group")
	if err != nil {
		return specs.User{}, err
	}
	defer group.Close()
	return findUser(passwd, group, c.GetLinux().GetSecurityContext(), image.User)
}

// openAccounts opens a file of accounts. One that is missing has none.
func openAccounts(root, name string) (io.ReadCloser, error) {
	f, err := beneath.Open(root, name, beneath.File, maxAccounts)
	if errors.Is(err, fs.ErrNotExist) {
		return os.Open(os.DevNull)
	}
	if err != nil {
		return nil, kind.Errorf(kind.Invalid, "image: %w", err)
	}
	return f, nil
}

func findUser(passwd, group io.Reader, sc *runtimeapi.LinuxContainerSecurityContext,
	imageUser string) (specs.User, error) {
	acc, err := findAccount(passwd, sc, imageUser)
	if err != nil {
		return specs.User{}, err
	}
	gids, err := acc.findGroups(group, sc.GetSupplementalGroupsPolicy() == runtimeapi.SupplementalGroupsPolicy_Merge)
	if err != nil {
		return specs.User{}, err
	}
	if g := sc.GetRunAsGroup(); g != nil {
		acc.gid = int(g.GetValue())
	}
	if acc.uid < 0 || acc.uid > maxID || acc.gid < 0 || acc.gid > maxID {
		return specs.User{}, invalid(fieldImage, "uid %d or gid %d is out of range 0..%d", acc.uid, acc.gid, maxID)
	}
	for _, g := range sc.GetSupplementalGroups() {
		gids = append(gids, uint32(g))
	}
	// The primary group is among them, as after a login, so that a process that
	// changes its gid keeps access to what the group owns.
	gids = append(gids, uint32(acc.gid))
	slices.Sort(gids)
	return specs.User{UID: uint32(acc.uid), GID: uint32(acc.gid), AdditionalGids: slices.Compact(gids)}, nil
}

// account is an identity.
type account struct {
	name     string // empty if /etc/passwd has none for the uid
	uid, gid int
	group    string // the name of the group that the image asks for instead of gid
}

// findAccount finds a user by its name or its uid: the first one in the file. A
// uid that is not there has the group 0.
func findAccount(passwd io.Reader, sc *runtimeapi.LinuxContainerSecurityContext, imageUser string) (account, error) {
	var acc account
	name, field := sc.GetRunAsUsername(), fieldUsername
	if u := sc.GetRunAsUser(); u != nil {
		acc.uid = int(u.GetValue())
	} else if name == "" {
		field = fieldImage
		name, acc.group, _ = strings.Cut(imageUser, ":")
		if uid, err := strconv.Atoi(name); err == nil {
			name, acc.uid = "", uid
		}
	}
	found := false
	err := scanAccounts(passwd, "image /etc/passwd", func(entry []string) error {
		uid, err := strconv.Atoi(entry[2])
		if err != nil || found || name != "" && entry[0] != name || name == "" && uid != acc.uid {
			return nil
		}
		found = true
		acc.name, acc.uid = entry[0], uid
		acc.gid, err = strconv.Atoi(entry[3])
		if err != nil {
			return invalid("image /etc/passwd", "user %q has the group %q", entry[0], entry[3])
		}
		return nil
	})
	if err == nil && name != "" && !found {
		err = invalid(field, "user %q is not in the image's /etc/passwd", name)
	}
	return acc, err
}

// findGroups sets the gid of the group that is asked for by name or number, and
// gives, if that is wanted, the groups that the user is a member of.
func (acc *account) findGroups(group io.Reader, memberships bool) (gids []uint32, err error) {
	gid, err := strconv.Atoi(acc.group)
	found := err == nil
	err = scanAccounts(group, "image /etc/group", func(entry []string) error {
		n, err := strconv.Atoi(entry[2])
		if err != nil {
			return nil
		}
		if !found && entry[0] == acc.group {
			found, gid = true, n
		}
		if memberships && acc.name != "" && n >= 0 && n <= maxID && isMember(entry[3], acc.name) {
			gids = append(gids, uint32(n))
		}
		if len(gids) >= maxGroups {
			return invalid("image /etc/group", "user %q is in %d groups, and the kernel takes no more", acc.name,
				maxGroups)
		}
		return nil
	})
	if acc.group == "" || err != nil {
		return gids, err
	}
	if !found {
		return nil, invalid(fieldImage, "group %q is not in the image's /etc/group", acc.group)
	}
	acc.gid = gid
	return gids, nil
}

func isMember(list, name string) bool {
	for m := range strings.SplitSeq(list, ",") {
		if m == name {
			return true
		}
	}
	return false
}

// scanAccounts calls each with the first four fields of each line, passwd(5) and
// group(5). Lines with fewer are none.
func scanAccounts(r io.Reader, field string, each func(entry []string) error) error {
	s := bufio.NewScanner(io.LimitReader(r, maxAccounts))
	s.Buffer(nil, maxAccountLine)
	for s.Scan() {
		entry := strings.SplitN(strings.TrimSpace(s.Text()), ":", 5)
		if len(entry) < 4 {
			continue
		}
		if err := each(entry); err != nil {
			return err
		}
	}
	if err := s.Err(); err != nil {
		return invalid(field, "cannot be read: %v", err) // also of a line that is too long
	}
	return nil
}
