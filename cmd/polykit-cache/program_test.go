package main

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// process is a server that runs as a program of its own.
type process struct {
	*exec.Cmd
	stdout  io.Reader
	address string        // empty if it ended before it listened
	ended   chan struct{} // closed when it has ended and the rest is known
	err     error         // of its end
	log     string
	stderr  bytes.Buffer
}

// spawn starts one of the programs that TestMain knows, as a server on a free port. Its log must be read
// for it to go on: by listen.
func spawn(name string, env []string, args ...string) (*process, error) {
	return spawnTo(nil, name, env, args...)
}

// spawnTo is spawn of a program whose standard error goes to a file, if it is not nil.
func spawnTo(stderr *os.File, name string, env []string, args ...string) (p *process, err error) {
	p = &process{Cmd: exec.Command(name, append([]string{"--port=0"}, args...)...), ended: make(chan struct{})}
	p.Env = env
	p.Stderr = &p.stderr
	if stderr != nil {
		p.Stderr = stderr
	}
	if p.stdout, err = p.StdoutPipe(); err != nil {
		return nil, err
	}
	return p, p.Start()
}

// listen waits until the server listens, or has ended.
func (p *process) listen() {
	address, rest := readAddress(p.stdout)
	p.address = address
	go func() {
		p.log = <-rest
		p.err = p.Wait()
		close(p.ended)
	}()
}

// readAddress reads the log of a server until it says the address that the server listens on, and
// goes on reading in the background: the whole log comes when the server has ended.
func readAddress(log io.Reader) (string, <-chan string) {
	expression := regexp.MustCompile(`\blistening"?[ ,]"?address"?[=:]"?([0-9.]+:[0-9]+|\[[0-9a-f:]+\]:[0-9]+)`)
	var text strings.Builder
	reader := bufio.NewReader(log)
	address := ""
	for address == "" {
		line, err := reader.ReadString('\n')
		text.WriteString(line)
		if match := expression.FindStringSubmatch(line); match != nil {
			address = match[1]
		}
		if err != nil {
			break
		}
	}
	all := make(chan string, 1)
	go func() {
		io.Copy(&text, reader)
		all <- text.String()
	}()
	return address, all
}

// started waits until the program listens, and kills it when the test ends, if it still runs then.
func (p *process) started(t *testing.T) {
	t.Helper()
	p.listen()
	t.Cleanup(func() {
		p.Process.Kill()
		<-p.ended
	})
	if p.address == "" {
		<-p.ended
		t.Fatalf("the server does not listen: %s%s", p.log, &p.stderr)
	}
}

// startProgram starts a program as a server that is killed when the test ends, if it still runs then.
func startProgram(t *testing.T, name, dir string, args ...string) *process {
	t.Helper()
	return startProgramTo(t, nil, name, dir, args...)
}

// startProgramTo starts a program whose standard error goes to stderr, if it is not nil.
func startProgramTo(t *testing.T, stderr *os.File, name, dir string, args ...string) *process {
	t.Helper()
	env := append(os.Environ(), "GORACE=atexit_sleep_ms=0") // with -race every process would sleep for a second at its end
	p, err := spawnTo(stderr, name, env, append([]string{"--storage-dir", dir}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	p.started(t)
	return p
}

// startIn starts a server in an environment besides the test's, and returns its log after it ended in good order.
func startIn(t *testing.T, env []string, args ...string) (address, log string) {
	t.Helper()
	env = slices.Concat(os.Environ(), []string{"GORACE=atexit_sleep_ms=0"}, env)
	p, err := spawn("polykit-cache", env, args...)
	if err != nil {
		t.Fatal(err)
	}
	p.started(t)
	if status, _, stderr := polykit(t, "healthcheck", "--server", "http://"+p.address); status != 0 {
		t.Errorf("healthcheck: exit status %d: %s", status, stderr)
	}
	p.Process.Signal(syscall.SIGTERM)
	return p.address, p.ends(t)
}

// ends waits until the program ends, which it must do with status 0, and returns its log.
func (p *process) ends(t *testing.T) string {
	t.Helper()
	if <-p.ended; p.err != nil || p.stderr.Len() > 0 {
		t.Errorf("the server ended with %v; its log:\n%s%s", p.err, p.log, &p.stderr)
	}
	return p.log
}

// skip skips a test where the system does not allow it. In CI it does, so there a skip is a failure.
func skip(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// freeAddress returns an address that nobody listens on, for programs that can't choose one.
func freeAddress(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}
