package main

import (
	"crypto/tls"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/polykit/polykit-cache/internal/cachetest"
)

// commands are the programs that tests can run, by name. This binary is all of them.
var commands = map[string]func(){"polykit-cache": main}

func TestMain(m *testing.M) { testscript.Main(m, commands) }

// TestScripts runs the scripts in testdata/script against the real program. Those of the client run
// once over REST and once over gRPC.
func TestScripts(t *testing.T) {
	for _, suite := range []struct {
		name, files string
		env         []string
	}{
		{"pack", "testdata/script/pack.txtar", nil},
		{"auth", "testdata/script/auth_*.txtar", nil},
		{"bench", "testdata/script/bench.txtar", nil},
		{"config", "testdata/script/config.txtar", nil},
		{"server", "testdata/script/server_*.txtar", nil},
		{"rest", "testdata/script/client_*.txtar", nil},
		{"grpc", "testdata/script/client_*.txtar", []string{"POLYKIT_CACHE_GRPC=true"}},
	} {
		t.Run(suite.name, func(t *testing.T) {
			files, err := filepath.Glob(suite.files)
			if err != nil || len(files) == 0 {
				t.Fatalf("no scripts %s: %v", suite.files, err)
			}
			testscript.Run(t, testscript.Params{
				Files: files,
				Setup: func(env *testscript.Env) error {
					// With -race every process would sleep for a second at its end.
					env.Vars = append(env.Vars, "GORACE=atexit_sleep_ms=0")
					env.Vars = append(env.Vars, suite.env...)
					env.Values[testingTB{}] = env.T()
					return nil
				},
				Cmds: map[string]func(*testscript.TestScript, bool, []string){
					"certs":      scriptCerts,
					"exits":      scriptExits,
					"flip":       scriptFlip,
					"refused":    scriptRefused,
					"server":     scriptServer,
					"stopserver": scriptStopServer,
					"tlsproxy":   scriptTLSProxy,
				},
			})
		})
	}
}

type testingTB struct{}

// scriptExits is "exits STATUS COMMAND...": the command exits with the status.
func scriptExits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits STATUS COMMAND...")
	}
	status := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		exit, ok := errors.AsType[*exec.ExitError](err)
		if !ok {
			ts.Fatalf("%v", err)
		}
		status = exit.ExitCode()
	}
	if want := args[0]; strconv.Itoa(status) != want {
		ts.Fatalf("exit status %d, want %s", status, want)
	}
}

// scriptRefused is "refused STATUS REGEXP COMMAND...": the command exits with the status, and says
// nothing but one line, which the expression matches as a whole, on standard error.
func scriptRefused(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 3 {
		ts.Fatalf("usage: refused STATUS REGEXP COMMAND...")
	}
	scriptExits(ts, false, append([]string{args[0]}, args[2:]...))
	if stdout := ts.ReadFile("stdout"); stdout != "" {
		ts.Fatalf("standard output is %q, want nothing", stdout)
	}
	line, err := regexp.Compile("^polykit-cache: " + args[1] + "\n$")
	ts.Check(err)
	if stderr := ts.ReadFile("stderr"); !line.MatchString(stderr) || strings.Count(stderr, "\n") != 1 {
		ts.Fatalf("standard error is %q, want one line that matches %q", stderr, line)
	}
}

// scriptServer is "server [NAME=VALUE...] [FLAG...]": it starts a server on $WORK/store and sets
// $SERVER to its URL, $POLYKIT_CACHE_SERVER for the client, $ADDRESS and $PORT. At the end of the script the server
// gets SIGTERM and must exit with status 0.
func scriptServer(ts *testscript.TestScript, neg bool, args []string) {
	if neg {
		ts.Fatalf("usage: server [NAME=VALUE...] [FLAG...]")
	}
	env := append(os.Environ(), "GORACE="+ts.Getenv("GORACE"))
	for len(args) > 0 && strings.Contains(args[0], "=") && !strings.HasPrefix(args[0], "-") {
		env, args = append(env, args[0]), args[1:]
	}
	p, err := spawn("polykit-cache", env, append([]string{"--storage-dir", ts.MkAbs("store")}, args...)...)
	ts.Check(err)
	p.listen()
	t := ts.Value(testingTB{}).(testing.TB)
	stop := sync.OnceFunc(func() {
		p.Process.Signal(syscall.SIGTERM)
		if <-p.ended; p.err != nil || !strings.Contains(p.log, "stopped") {
			t.Errorf("the server ended with %v; its log:\n%s%s", p.err, p.log, p.stderr.String())
		}
	})
	ts.Defer(stop)
	scriptStops.Store(ts, stop)
	if p.address == "" {
		<-p.ended
		ts.Fatalf("the server does not listen: %s", p.stderr.String())
	}
	scheme := "http://"
	if slices.Contains(args, "--tls-cert") {
		scheme = "https://"
	}
	ts.Setenv("ADDRESS", p.address)
	_, port, err := net.SplitHostPort(p.address)
	ts.Check(err)
	ts.Setenv("PORT", port)
	ts.Setenv("SERVER", scheme+p.address)
	ts.Setenv("POLYKIT_CACHE_SERVER", scheme+p.address)
}

// scriptCerts is "certs DIR": it makes an authority, whose certificate is DIR/ca.pem, and DIR/cert.pem with
// DIR/key.pem, which it issued.
func scriptCerts(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: certs DIR")
	}
	dir := ts.MkAbs(args[0])
	ts.Check(os.MkdirAll(dir, 0o755))
	cachetest.NewAuthority(args[0]).Write(ts.Value(testingTB{}).(testing.TB), dir, args[0])
}

// scriptStops has, for each script, what scriptStops its server.
var scriptStops sync.Map

// scriptStopServer is "stopserver": it scriptStops the server that was started last.
func scriptStopServer(ts *testscript.TestScript, neg bool, args []string) {
	stop, started := scriptStops.LoadAndDelete(ts)
	if neg || len(args) > 0 || !started {
		ts.Fatalf("usage: stopserver, where one runs")
	}
	stop.(func())()
}

// scriptFlip is "flip FILE": it flips a bit in the middle of a file, as a disk may, without changing
// the file's time.
func scriptFlip(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: flip FILE")
	}
	path := ts.MkAbs(args[0])
	stat, err := os.Stat(path)
	ts.Check(err)
	content, err := os.ReadFile(path)
	ts.Check(err)
	content[len(content)/2] ^= 1
	ts.Check(os.WriteFile(path, content, 0o644))
	ts.Check(os.Chtimes(path, stat.ModTime(), stat.ModTime()))
}

// scriptTLSProxy is "tlsproxy": it puts a proxy with TLS in front of $SERVER, sets $TLSADDRESS to its
// address, and lets the commands trust it.
func scriptTLSProxy(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) > 0 {
		ts.Fatalf("usage: tlsproxy")
	}
	template := httptest.NewTLSServer(nil) // for its certificate
	template.Close()
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: template.Certificate().Raw})
	ts.Check(os.WriteFile(ts.MkAbs("ca.pem"), certificate, 0o644))
	ts.Setenv("SSL_CERT_FILE", ts.MkAbs("ca.pem"))
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		Certificates: template.TLS.Certificates,
		NextProtos:   []string{"h2", "http/1.1"},
	})
	ts.Check(err)
	ts.Defer(func() { listener.Close() })
	backend := strings.TrimPrefix(ts.Getenv("SERVER"), "http://")
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go tunnel(conn, backend)
		}
	}()
	ts.Setenv("TLSADDRESS", listener.Addr().String())
}

// tunnel passes bytes both ways until one side ends.
func tunnel(client net.Conn, address string) {
	defer client.Close()
	server, err := net.Dial("tcp", address)
	if err != nil {
		return
	}
	defer server.Close()
	go func() {
		io.Copy(server, client)
		server.Close()
	}()
	io.Copy(client, server)
}
