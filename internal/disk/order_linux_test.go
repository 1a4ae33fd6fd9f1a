package disk_test

import (
	"bufio"
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// TestOrderInScope traces a process that uploads to a scope and promotes from it: the calls are those that commit.go
// lists, in that order. No crash can tell, but only a power cut.
func TestOrderInScope(t *testing.T) {
	if dir := os.Getenv(childVariable); dir != "" {
		r := open(t, dir)
		pr := r.in(pr7)
		pr.put(t, key, content)
		pr.put(t, keyOf(digits[:60]+"0000"), cachetest.Random(keyOf(digits[:60]+"0000"), 100))
		if _, err := r.Promote(t.Context(), pr7, artifact.DefaultScope, key); err != nil {
			t.Error(err)
		}
		if _, err := r.Promote(t.Context(), pr7, pr8, key); err != nil {
			t.Error(err)
		}
		return
	}
	strace, err := exec.LookPath("strace")
	if err != nil {
		skip(t, "no strace: %v", err)
	}
	dir := t.TempDir()
	command := child(t, filepath.Join(dir, "store"))
	file := filepath.Join(dir, "trace")
	command.Args = slices.Concat([]string{strace, "-f", "-qq", "-y", "-s500", "-e", "trace=fsync,linkat,mkdirat", "-e", "signal=none", "-o", file}, []string{command.Path}, command.Args[1:])
	command.Path = strace
	var output bytes.Buffer
	command.Stdout, command.Stderr = &output, &output
	if err := command.Run(); err != nil {
		if strings.Contains(output.String(), "PTRACE") {
			skip(t, "strace may not trace: %s", &output)
		}
		t.Fatalf("%v\n%s", err, &output)
	}

	// Names in tmp/ are unique, and what others do is not in the directory.
	call := regexp.MustCompile(`^\d+ +(fsync|linkat|mkdirat)\((.*)`)
	path := regexp.MustCompile(regexp.QuoteMeta(filepath.Join(dir, "store")) + `/?([^">]*)`)
	var got []string
	lines := bufio.NewScanner(bytes.NewReader(read(t, file)))
	for lines.Scan() {
		m := call.FindStringSubmatch(lines.Text())
		if m == nil {
			continue
		}
		paths := path.FindAllStringSubmatch(m[2], -1)
		if len(paths) == 0 {
			continue
		}
		text := m[1]
		for _, p := range paths {
			name := p[1]
			if strings.HasPrefix(name, "tmp/") {
				name = "tmp/1"
			}
			text += " /" + strings.ReplaceAll(strings.ReplaceAll(name, digits[:60], "KEY"), ".polykit-cache/scopes", "SCOPES")
		}
		got = append(got, text)
	}
	want := strings.Split(strings.TrimSpace(`
fsync /tmp/1
mkdirat /.polykit-cache
mkdirat /SCOPES
mkdirat /SCOPES/pr-7
mkdirat /SCOPES/pr-7/01
mkdirat /SCOPES/pr-7/01/23
fsync /
fsync /.polykit-cache
fsync /SCOPES
fsync /SCOPES/pr-7
fsync /SCOPES/pr-7/01
linkat /tmp/1 /SCOPES/pr-7/01/23/KEYcdef.zst
fsync /SCOPES/pr-7/01/23
fsync /tmp/1
linkat /tmp/1 /SCOPES/pr-7/01/23/KEY0000.zst
fsync /SCOPES/pr-7/01/23
linkat /SCOPES/pr-7/01/23/KEYcdef.zst /tmp/1
fsync /tmp/1
mkdirat /01
fsync /
mkdirat /01/23
fsync /01
linkat /tmp/1 /01/23/KEYcdef.zst
fsync /01/23
linkat /SCOPES/pr-7/01/23/KEYcdef.zst /tmp/1
fsync /tmp/1
mkdirat /SCOPES/pr-8
mkdirat /SCOPES/pr-8/01
mkdirat /SCOPES/pr-8/01/23
fsync /SCOPES
fsync /SCOPES/pr-8
fsync /SCOPES/pr-8/01
linkat /tmp/1 /SCOPES/pr-8/01/23/KEYcdef.zst
fsync /SCOPES/pr-8/01/23`), "\n")
	begin := slices.Index(got, want[0]) // what Open does comes before
	if begin < 0 || !slices.Equal(got[begin:], want) {
		t.Errorf("the calls are\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestLinkFailsInScope has the scopes on a file system of their own, to which nothing can be linked. The process may
// mount one where users may make namespaces.
func TestLinkFailsInScope(t *testing.T) {
	dir := os.Getenv(childVariable)
	if dir == "" {
		command := child(t, t.TempDir())
		command.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		}
		run(t, command)
		return
	}
	r := open(t, dir)
	mkdir(t, r.path(scopesName))
	if err := syscall.Mount("tmpfs", r.path(scopesName), "tmpfs", 0, "size=512k"); err != nil {
		skip(t, "mount: %v", err)
	}
	if _, err := r.in(pr7).Put(t.Context(), key, -1, bytes.NewReader(content)); !errors.Is(err, syscall.EXDEV) {
		t.Errorf("Put returned %v", err)
	}
	r.put(t, key, content)
	if _, err := r.Promote(t.Context(), artifact.DefaultScope, pr7, key); !errors.Is(err, syscall.EXDEV) {
		t.Errorf("Promote returned %v", err)
	}
	if left := list(t, r.path(scopesName)); len(left) != 0 {
		t.Errorf("left is %q", left)
	}
	r.tmpIsEmpty(t)
}
