//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// process is a server, with the processes that it has started.
type process struct {
	cmd    *exec.Cmd
	url    *url.URL
	output *tail // what it said last
	ended  chan error
}

// tail is the last that was written to it.
type tail struct{ text []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.text = append(t.text, p...)
	t.text = t.text[max(0, len(t.text)-tailSize):]
	return len(p), nil
}

func (t *tail) String() string { return string(t.text) }

const tailSize = 4 << 10

// startTimeout bounds the time until a server answers.
const startTimeout = time.Minute

var listening = regexp.MustCompile(`address=(\S+)`)

// startServer starts the program that is measured on a storage directory, and returns once it listens.
func (b *bench) startServer(ctx context.Context, dir string, flags ...string) (*process, error) {
	cmd := exec.CommandContext(ctx, b.binary, append([]string{"--storage-dir", dir, "--bind", "127.0.0.1", "--port", "0"}, flags...)...)
	return start(cmd, listening)
}

// startReference starts this program as one of the references that are servers.
func startReference(ctx context.Context, args ...string) (*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return start(exec.CommandContext(ctx, self, append([]string{referenceArg}, args...)...), listening)
}

// start starts a server and waits until it says where it listens.
func start(cmd *exec.Cmd, where *regexp.Regexp) (*process, error) {
	p := &process{cmd: cmd, output: new(tail), ended: make(chan error, 1)}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	output, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	found := make(chan string, 1)
	go func() {
		lines := bufio.NewScanner(output)
		for lines.Scan() {
			fmt.Fprintln(p.output, lines.Text())
			if match := where.FindStringSubmatch(lines.Text()); match != nil {
				select {
				case found <- match[1]:
				default:
				}
			}
		}
		p.ended <- cmd.Wait()
	}()
	select {
	case address := <-found:
		p.url = &url.URL{Scheme: "http", Host: address}
		return p, nil
	case err := <-p.ended:
		return nil, fmt.Errorf("%s ended: %w\n%s", filepath.Base(cmd.Path), err, p.output)
	case <-time.After(startTimeout):
		cmd.Process.Kill()
		return nil, fmt.Errorf("%s did not listen within %v", filepath.Base(cmd.Path), startTimeout)
	}
}

// nginxConfig sends files by the rules of Debian's own configuration, but for what would be unfair: it
// writes no log, and keeps connections for as many requests as come.
const nginxConfig = `daemon off;
%[4]s
worker_processes auto;
pid %[1]s/nginx.pid;
error_log stderr crit;
worker_rlimit_nofile 20000;
events { worker_connections 4096; }
http {
	types { application/zstd zst; }
	default_type application/zstd;
	access_log off;
	sendfile on;
	tcp_nopush on;
	keepalive_requests 1000000000;
	client_body_temp_path %[1]s/body;
	proxy_temp_path %[1]s/proxy;
	fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi;
	scgi_temp_path %[1]s/scgi;
	server {
		listen 127.0.0.1:%[2]d;
		root %[3]s;
	}
}
`

// startNginx starts nginx on the files below root.
func (b *bench) startNginx(ctx context.Context, root string) (*process, error) {
	program, err := exec.LookPath("nginx")
	if err != nil {
		if program, err = exec.LookPath("/usr/sbin/nginx"); err != nil { // which is not in everybody's PATH
			return nil, errors.New("nginx is not installed; on Debian: apt-get install nginx-light")
		}
	}
	dir, err := os.MkdirTemp(b.dir, "nginx-")
	if err != nil {
		return nil, err
	}
	user := ""
	if os.Geteuid() == 0 { // its workers would run as somebody else, who can't read the files
		user = "user root;"
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(config, fmt.Appendf(nil, nginxConfig, dir, port, root, user), 0o644); err != nil {
		return nil, err
	}
	p := &process{cmd: exec.CommandContext(ctx, program, "-e", "stderr", "-c", config), output: new(tail), ended: make(chan error, 1)}
	p.cmd.Cancel = func() error { return p.cmd.Process.Signal(syscall.SIGTERM) }
	p.cmd.Stderr = p.output
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { p.ended <- p.cmd.Wait() }()
	p.url = &url.URL{Scheme: "http", Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(port))}
	// It does not say when it listens.
	for deadline := time.Now().Add(startTimeout); ; time.Sleep(10 * time.Millisecond) {
		conn, err := net.Dial("tcp", p.url.Host)
		if err == nil {
			return p, conn.Close()
		}
		select {
		case err := <-p.ended:
			return nil, fmt.Errorf("nginx ended: %w\n%s", err, p.output)
		default:
		}
		if time.Now().After(deadline) {
			p.cmd.Process.Kill()
			return nil, fmt.Errorf("nginx did not listen within %v", startTimeout)
		}
	}
}

// freePort returns a port that nobody listens on, for a server that can't choose one.
func freePort() (int, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer listener.Close()
	return listener.Addr().(*net.TCPAddr).Port, nil
}

// raiseFiles lets this process, and each that it starts, have as many open files as one end of n
// connections needs.
func raiseFiles(n int) error {
	need := uint64(n + 1000)
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	if limit.Max < need {
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: need, Max: need}); err != nil {
			return fmt.Errorf("%d idle connections need %d open files, and the limit is %d: raise it with ulimit -Hn, or give a lower -idle", n, need, limit.Max)
		}
	}
	return nil
}

// stop ends a server in its own good order.
func (p *process) stop() error {
	p.cmd.Process.Signal(syscall.SIGTERM)
	err := <-p.ended
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGTERM {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", filepath.Base(p.cmd.Path), err, p.output)
	}
	return nil
}

// kill ends a server at once.
func (p *process) kill() {
	p.cmd.Process.Kill()
	<-p.ended
}

// cpu returns the processor time that the process took, and its children that live.
func (p *process) cpu() (time.Duration, error) {
	pids, err := family(p.cmd.Process.Pid)
	if err != nil {
		return 0, err
	}
	var total time.Duration
	for _, pid := range pids {
		// utime and stime, in hundredths of a second, are the twelfth and thirteenth field behind the
		// name of the program, which may have spaces: proc_pid_stat(5).
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return 0, err
		}
		fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
		for _, field := range fields[11:13] {
			ticks, err := strconv.ParseInt(field, 10, 64)
			if err != nil {
				return 0, err
			}
			total += time.Duration(ticks) * time.Second / 100
		}
	}
	return total, nil
}

// family returns a process and its children.
func family(pid int) ([]int, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid))
	if err != nil {
		return nil, err
	}
	pids := []int{pid}
	for _, field := range strings.Fields(string(text)) {
		child, err := strconv.Atoi(field)
		if err != nil {
			return nil, err
		}
		pids = append(pids, child)
	}
	return pids, nil
}

// memory returns a line of what the kernel says of the memory of a process, in bytes: VmRSS for what is
// resident, VmHWM for the most that ever was.
func (p *process) memory(name string) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("the kernel does not say %s", name)
}
