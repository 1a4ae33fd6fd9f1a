package main

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/client"
)

// This file puts real reverse proxies, configured as in deploy/, between clients and a server.

const (
	// proxiedSize is far more than what proxies and sockets between them buffer.
	proxiedSize = 64 * mebi
	// proxiedLimit is the server's, and fits an artifact of that size.
	proxiedLimit = 65 * mebi
	// prefix is the path that the proxies take off.
	prefix = "/some/prefix"
)

// reverseProxy is one that deploy/ has a configuration for.
type reverseProxy struct {
	name  string
	start func(t *testing.T, dir, backend, timeout string) (address string)
	// reads says that it goes on reading what a client sends when the answer is there. Caddy closes the
	// connection, as its configuration says, and who does not read what has come before loses it.
	reads bool
}

var reverseProxies = []reverseProxy{{"nginx", startNginx, true}, {"caddy", startCaddy, false}}

// startNginx starts nginx with the certificate in a directory, in front of an address. A timeout, if
// there is one, is for all of its own.
func startNginx(t *testing.T, dir, backend, timeout string) string {
	t.Helper()
	program, err := exec.LookPath("nginx")
	if err != nil {
		if program, err = exec.LookPath("/usr/sbin/nginx"); err != nil { // which is not in everybody's PATH
			skip(t, "nginx is not installed; on Debian: apt-get install nginx-light")
		}
	}
	text, err := os.ReadFile("../../deploy/nginx.conf")
	check(t, err)
	address := freeAddress(t)
	config := edit(t, string(text),
		"127.0.0.1:8080;", backend+";",
		"listen 443 ", "listen "+address+" ",
		"/etc/ssl/cache.example.com.pem", filepath.Join(dir, "cert.pem"),
		"/etc/ssl/cache.example.com.key", filepath.Join(dir, "key.pem"))
	if timeout != "" {
		config = edit(t, config, "_timeout 5m", "_timeout "+timeout)
	}
	user := ""
	if os.Geteuid() == 0 { // its workers would be somebody else, who can't read the files
		user = "user root;"
	}
	check(t, os.WriteFile(filepath.Join(dir, "polykit-cache.conf"), []byte(config), 0o600),
		os.WriteFile(filepath.Join(dir, "nginx.conf"), fmt.Appendf(nil, `daemon off;
%[2]s
worker_processes 1;
pid %[1]s/nginx.pid;
error_log stderr error;
events { worker_connections 1024; }
http {
	access_log off;
	client_body_temp_path %[1]s/body;
	proxy_temp_path %[1]s/proxy;
	fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi;
	scgi_temp_path %[1]s/scgi;
	include %[1]s/polykit-cache.conf;
}
`, dir, user), 0o600))
	runProxy(t, address, exec.Command(program, "-e", "stderr", "-c", filepath.Join(dir, "nginx.conf")))
	check(t, os.Remove(filepath.Join(dir, "body")), os.Remove(filepath.Join(dir, "proxy"))) // it is to write no body to a file
	return address
}

// startCaddy does the same of Caddy, whose timeouts are not set.
func startCaddy(t *testing.T, dir, backend, timeout string) string {
	t.Helper()
	program, err := exec.LookPath("caddy")
	if err != nil {
		skip(t, "caddy is not installed; on Debian: apt-get install caddy")
	}
	text, err := os.ReadFile("../../deploy/Caddyfile")
	check(t, err)
	address := freeAddress(t)
	config := "{\n\tadmin off\n\tauto_https off\n\tdefault_bind 127.0.0.1\n}\n" + edit(t, string(text),
		"127.0.0.1:8080\n", backend+"\n",
		"cache.example.com {", "https://"+address+" {\n\ttls "+filepath.Join(dir, "cert.pem")+" "+filepath.Join(dir, "key.pem"))
	file := filepath.Join(dir, "Caddyfile")
	check(t, os.WriteFile(file, []byte(config), 0o600))
	command := exec.Command(program, "run", "--adapter", "caddyfile", "--config", file)
	command.Env = append(os.Environ(), "HOME="+dir, "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
	runProxy(t, address, command)
	return address
}

// runProxy runs a proxy until the test ends, and returns when it listens.
func runProxy(t *testing.T, address string, command *exec.Cmd) {
	t.Helper()
	var output bytes.Buffer
	command.Stdout, command.Stderr = &output, &output
	check(t, command.Start())
	ended := make(chan error, 1)
	go func() { ended <- command.Wait() }()
	t.Cleanup(func() {
		command.Process.Signal(os.Interrupt)
		if err, ok := <-ended; ok {
			close(ended)
			if t.Failed() {
				t.Logf("the proxy ended: %v; it said\n%s", err, &output)
			}
		}
	})
	waitUntil(t, "the proxy listens", func() bool {
		select {
		case err := <-ended:
			close(ended)
			t.Fatalf("the proxy ended: %v; it said\n%s", err, &output)
		default:
		}
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
}

// proxied is a server behind a proxy.
type proxied struct {
	*process
	dir  string // storage directory
	base string // URL of the proxy
	ca   string // file with the certificate that it is to be trusted by
	tls  *tls.Config
	rest *client.REST
	grpc *client.GRPC
}

// newProxied starts a server and a proxy in front of it.
func newProxied(t *testing.T, proxy reverseProxy, timeout string, flags ...string) *proxied {
	t.Helper()
	certs, authority := t.TempDir(), cachetest.NewAuthority("authority")
	authority.Write(t, certs, "proxy")
	p := &proxied{dir: t.TempDir(), ca: filepath.Join(certs, "ca.pem"), tls: &tls.Config{RootCAs: authority.Pool()}}
	p.process = startProgram(t, "polykit-cache", p.dir, append([]string{"--max-size", fmt.Sprint(proxiedLimit), "--min-free=0"}, flags...)...)
	p.base = "https://" + proxy.start(t, certs, p.address, timeout)
	p.rest, p.grpc = p.dial(t, p.base)
	return p
}

// dial returns clients of a URL.
func (p *proxied) dial(t *testing.T, base string) (*client.REST, *client.GRPC) {
	t.Helper()
	server, err := client.ParseServer(base)
	check(t, err)
	rest := client.NewREST(server, p.tls.Clone())
	t.Cleanup(func() { rest.Close() })
	if server.Path != "" {
		return rest, nil
	}
	grpc, err := client.NewGRPC(server, p.tls.Clone())
	check(t, err)
	t.Cleanup(func() { grpc.Close() })
	return rest, grpc
}

// http2 returns a client of REST over HTTP/2.
func (p *proxied) http2(t *testing.T) http2Client {
	protocols := &http.Protocols{}
	protocols.SetHTTP2(true)
	transport := &http.Transport{Protocols: protocols, TLSClientConfig: p.tls.Clone()}
	t.Cleanup(transport.CloseIdleConnections)
	return http2Client{transport, p.base + "/v1/artifacts/"}
}
