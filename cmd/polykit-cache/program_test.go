package main

import (
	"bytes"
	"os"
	"os/exec"
	"testing"
)

// program is a server that runs as a process of its own.
type program struct {
	*exec.Cmd
	address string
	log     <-chan string // the whole log, once the process has ended
	stderr  bytes.Buffer
}

// startProgram starts one of the programs that TestMain knows, as a server that is killed when the test
// ends, if it still runs then.
func startProgram(t *testing.T, name, dir string, args ...string) *program {
	t.Helper()
	return startProgramTo(t, nil, name, dir, args...)
}

// startProgramTo starts a program whose standard error goes to stderr, if it is not nil.
func startProgramTo(t *testing.T, stderr *os.File, name, dir string, args ...string) *program {
	t.Helper()
	p := &program{Cmd: exec.Command(name, append([]string{"--port=0", "--storage-dir", dir}, args...)...)}
	p.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	p.Stderr = &p.stderr
	if stderr != nil {
		p.Stderr = stderr
	}
	stdout, err := p.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Process.Kill()
		p.Wait()
	})
	if p.address, p.log = readAddress(stdout); p.address == "" {
		t.Fatalf("the server does not listen: %s%s", <-p.log, &p.stderr)
	}
	return p
}

// ends waits until the program ends, which it must do with status 0, and returns its log.
func (p *program) ends(t *testing.T) string {
	t.Helper()
	log := <-p.log
	if err := p.Wait(); err != nil || p.stderr.Len() > 0 {
		t.Errorf("the server ended with %v; its log:\n%s%s", err, log, &p.stderr)
	}
	return log
}
