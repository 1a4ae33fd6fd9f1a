package server_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/polykit/polykit-cache/internal/cachetest"
)

// refusalBody is far more than any socket's buffers hold, so a refused client is still sending.
const refusalBody = 64 << 20

// TestRefusalIsRead proves that clients which are still sending a body read why it was refused, and
// do not meet a connection reset.
func TestRefusalIsRead(t *testing.T) {
	base := startForClients(t)
	stored := cachetest.Key("stored")
	putForClients(t, base+"/v1/artifacts/"+stored.String(), cachetest.Sound(stored, nil))
	file := filepath.Join(t.TempDir(), "body")
	if err := os.WriteFile(file, bytes.Repeat([]byte("not an artifact\n"), refusalBody/16), 0o666); err != nil {
		t.Fatal(err)
	}

	// Each client sends the file ten times and prints the status it read each time.
	const tries = 10
	curl := `for i in $(seq ` + fmt.Sprint(tries) + `); do curl -sS -o /dev/null -w '%{http_code}\n' "$@"; done`
	clients := []struct {
		name    string
		command func(url string) []string
	}{
		{"curl", func(url string) []string {
			return []string{"bash", "-c", curl, "-", "-T", file, url}
		}},
		{"curl without Expect", func(url string) []string {
			return []string{"bash", "-c", curl, "-", "-H", "Expect:", "-T", file, url}
		}},
		{"curl chunked without Expect", func(url string) []string {
			return []string{"bash", "-c", curl, "-", "-H", "Expect:", "-H", "Transfer-Encoding: chunked", "-T", file, url}
		}},
		{"curl HTTP2", func(url string) []string {
			return []string{"bash", "-c", curl, "-", "--http2-prior-knowledge", "-T", file, url}
		}},
		{"node", func(url string) []string {
			return []string{"node", "--input-type=module", "-e", `
				import fs from "node:fs"
				const body = fs.readFileSync(process.argv[1])
				for (let i = 0; i < ` + fmt.Sprint(tries) + `; i++) {
					const response = await fetch(process.argv[2], {method: "PUT", body})
					await response.json()
					console.log(response.status)
				}`, file, url}
		}},
		{"python3", func(url string) []string {
			return []string{"python3", "-c", `
import http.client, json, sys, urllib.parse
url = urllib.parse.urlsplit(sys.argv[2])
body = open(sys.argv[1], "rb").read()
for i in range(` + fmt.Sprint(tries) + `):
    connection = http.client.HTTPConnection(url.netloc)
    connection.request("PUT", url.path, body)
    response = connection.getresponse()
    json.load(response)["error"]
    print(response.status)
    connection.close()
`, file, url}
		}},
	}
	refusals := []struct {
		status int
		key    string
	}{
		{400, "not-a-key"},
		{409, stored.String()},
		{413, cachetest.Key("large").String()},
	}
	for _, client := range clients {
		for _, refusal := range refusals {
			t.Run(fmt.Sprint(client.name, " ", refusal.status), func(t *testing.T) {
				want := refusal.status
				if want == 413 && strings.Contains(client.name, "chunked") {
					want = 422 // the size is not known, so what the body is not is found first
				}
				args := client.command(base + "/v1/artifacts/" + refusal.key)
				for _, program := range []string{args[0], strings.Fields(client.name)[0]} {
					if _, err := exec.LookPath(program); err != nil {
						if os.Getenv("CI") == "true" {
							t.Fatal(err)
						}
						t.Skip(err)
					}
				}
				output, err := exec.Command(args[0], args[1:]...).CombinedOutput()
				if want := strings.Repeat(fmt.Sprintln(want), tries); err != nil || string(output) != want {
					t.Errorf("client ended with %v and printed\n%swant\n%s", err, output, want)
				}
			})
		}
	}
	for _, refusal := range refusals {
		t.Run(fmt.Sprint("go ", refusal.status), func(t *testing.T) {
			for range tries {
				body, err := os.Open(file)
				if err != nil {
					t.Fatal(err)
				}
				request, err := http.NewRequest(http.MethodPut, base+"/v1/artifacts/"+refusal.key, body)
				if err != nil {
					t.Fatal(err)
				}
				request.ContentLength = refusalBody
				response, err := http.DefaultClient.Do(request)
				if err != nil {
					t.Fatal(err)
				}
				text, err := io.ReadAll(response.Body)
				response.Body.Close()
				if response.StatusCode != refusal.status || err != nil || !strings.HasPrefix(string(text), `{"error":"`) {
					t.Errorf("got %d, %s, %v; want %d", response.StatusCode, text, err, refusal.status)
				}
			}
		})
	}
}

// TestRefusalWithoutBody proves that a client which waits for "100 Continue" gets the refusal in its
// place, need not send the body, and does not hold up the server's shutdown.
func TestRefusalWithoutBody(t *testing.T) {
	s, _ := newServer(t, nil)
	address, stop, served := serveUntil(t, s)
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "PUT /v1/artifacts/%s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n", cachetest.Key("large"), refusalBody)
	answer, err := io.ReadAll(conn) // to the end of the connection, which this client does not close
	if !strings.HasPrefix(string(answer), "HTTP/1.1 413 ") || err != nil {
		t.Errorf("got %q, %v; want the final status 413", answer, err)
	}
	stop()
	if err := <-served; err != nil {
		t.Errorf("Serve returned %v", err)
	}
}

// TestRefusedClientLeaves lets clients that were refused hang up in the middle of the body, with so
// little left of it that net/http would read the rest itself: it must not panic.
func TestRefusedClientLeaves(t *testing.T) {
	base := startForClients(t)
	stored := cachetest.Key("stored")
	putForClients(t, base+"/v1/artifacts/"+stored.String(), cachetest.Sound(stored, nil))
	for range 20 {
		conn, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "PUT /v1/artifacts/%s HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n%s", stored, make([]byte, 200_000))
		status := make([]byte, len("HTTP/1.1 409"))
		if _, err := io.ReadFull(conn, status); string(status) != "HTTP/1.1 409" || err != nil {
			t.Errorf("got %q, %v; want the status 409", status, err)
		}
		conn.Close()
	}
}

// startForClients starts a server that takes artifacts of up to 1 MiB and returns its URL.
func startForClients(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	s, _ := newServer(t, nil)
	go func() { served <- s.Serve(ctx, listener) }()
	t.Cleanup(func() {
		stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return "http://" + listener.Addr().String()
}

func putForClients(t *testing.T, url string, body []byte) {
	t.Helper()
	request, err := http.NewRequest(http.MethodPut, url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusCreated {
		t.Fatalf("PUT: %s", response.Status)
	}
}
