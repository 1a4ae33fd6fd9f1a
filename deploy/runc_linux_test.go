package deploy_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func ownerOf(info os.FileInfo) [2]uint32 {
	stat := info.Sys().(*syscall.Stat_t)
	return [2]uint32{stat.Uid, stat.Gid}
}

// settings are how a container is run.
type settings struct {
	args     []string          // beside the image's entry point
	env      []string          // beside the image's
	volumes  map[string]string // directories of this machine, by path in the container
	readOnly bool              // the root file system
	caps     []string          // capabilities
	noNew    bool              // no new privileges
	memory   int64             // limit, in bytes
}

// container is one that runs.
type container struct {
	t      *testing.T
	id     string
	state  string // directory of runc's
	cmd    *exec.Cmd
	listen bool          // it came so far
	log    string        // once it has ended
	err    error         // of its end
	ended  chan struct{} // closed then
	pid    int
	net    *os.File // its network namespace
}

// run runs an image until the test ends, and returns when it listens.
func (i image) run(t *testing.T, s settings) *container {
	t.Helper()
	bundle := t.TempDir()
	uid, gid := uint32(0), uint32(0)
	if _, err := fmt.Sscanf(i.config.User, "%d:%d", &uid, &gid); err != nil {
		t.Fatalf("the image's user %q is not a number, as Kubernetes must have it: %v", i.config.User, err)
	}
	type object = map[string]any
	mounts := []object{
		{"destination": "/proc", "type": "proc", "source": "proc"},
		{"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": []string{"nosuid", "mode=755", "size=65536k"}},
		{"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": []string{"nosuid", "noexec", "nodev", "ro"}},
		{"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": []string{"nosuid", "noexec", "nodev", "ro"}},
	}
	for path, dir := range s.volumes {
		mounts = append(mounts, object{"destination": path, "type": "bind", "source": dir, "options": []string{"rbind", "rw"}})
	}
	namespaces := []object{}
	for _, namespace := range []string{"pid", "network", "ipc", "uts", "mount"} {
		namespaces = append(namespaces, object{"type": namespace})
	}
	config := object{
		"ociVersion": "1.0.2",
		"root":       object{"path": i.root, "readonly": s.readOnly},
		"mounts":     mounts,
		"process": object{
			"user": object{"uid": uid, "gid": gid}, "cwd": "/", "noNewPrivileges": s.noNew,
			"args": slices.Concat(i.config.Entrypoint, i.config.Cmd, s.args), "env": slices.Concat(i.config.Env, s.env),
			"capabilities": object{"bounding": s.caps, "effective": s.caps, "permitted": s.caps},
		},
		"linux": object{"namespaces": namespaces, "resources": object{"memory": object{"limit": s.memory}}},
	}
	text, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), text, 0o644); err != nil {
		t.Fatal(err)
	}
	c := &container{t: t, id: fmt.Sprintf("polykit-cache-test-%d", os.Getpid()), state: t.TempDir(), ended: make(chan struct{})}
	c.cmd = exec.Command("runc", "--root", c.state, "run", "--bundle", bundle, c.id)
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.cmd.Stderr = c.cmd.Stdout
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		exec.Command("runc", "--root", c.state, "delete", "--force", c.id).Run()
		<-c.ended
	})
	reader := bufio.NewReader(out)
	for !c.listen {
		line, err := reader.ReadString('\n')
		c.log += line
		c.listen = strings.Contains(line, "msg=listening")
		if err != nil {
			break
		}
	}
	go func() {
		rest, _ := io.ReadAll(reader)
		c.log += string(rest)
		c.err = c.cmd.Wait()
		close(c.ended)
	}()
	if !c.listen {
		<-c.ended
		t.Fatalf("the server does not listen: %v\n%s", c.err, c.log)
	}
	var state struct{ Pid int }
	if err := json.Unmarshal([]byte(command(t, "", "runc", "--root", c.state, "state", c.id)), &state); err != nil {
		t.Fatal(err)
	}
	c.pid = state.Pid
	if c.net, err = os.Open(fmt.Sprintf("/proc/%d/ns/net", state.Pid)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.net.Close() })
	return c
}

// exec runs a command in the container, as its user.
func (c *container) exec(args ...string) string {
	c.t.Helper()
	return command(c.t, "", append([]string{"runc", "--root", c.state, "exec", c.id}, args...)...)
}

// confined checks that the server may do no more than compose.yaml says.
func (c *container) confined() {
	c.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.pid))
	if err != nil {
		c.t.Fatal(err)
	}
	for _, want := range []string{"Uid:\t65532\t65532\t65532\t65532\n", "Gid:\t65532\t", "CapEff:\t0000000000000000\n", "CapBnd:\t0000000000000000\n", "NoNewPrivs:\t1\n"} {
		if !strings.Contains(string(status), want) {
			c.t.Errorf("the status lacks %q:\n%s", want, status)
		}
	}
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", c.pid))
	if err != nil {
		c.t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); fields[4] == "/" && !strings.HasPrefix(fields[5], "ro") {
			c.t.Errorf("the root file system can be written to: %s", line)
		}
	}
}

// stop stops the server in good order, and returns its log.
func (c *container) stop() string {
	c.t.Helper()
	command(c.t, "", "runc", "--root", c.state, "kill", c.id, "TERM")
	if <-c.ended; c.err != nil || !strings.Contains(c.log, "msg=stopped") {
		c.t.Errorf("the server ended with %v; its log:\n%s", c.err, c.log)
	}
	return c.log
}

// dial connects to an address in the container.
func (c *container) dial(ctx context.Context, network, address string) (net.Conn, error) {
	runtime.LockOSThread() // and so is lost with the goroutine if it can't go back
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, err
	}
	defer own.Close()
	if err := unix.Setns(int(c.net.Fd()), unix.CLONE_NEWNET); err != nil {
		return nil, err
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
	if back := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); back != nil {
		return nil, back
	}
	runtime.UnlockOSThread()
	return conn, err
}

// client returns a client of the server in the container, at http://127.0.0.1:8080.
func (c *container) client() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: c.dial, DisableCompression: true, MaxIdleConnsPerHost: 100}}
}
