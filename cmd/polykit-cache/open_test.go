package main

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/polykit/polykit-cache/internal/auth"
)

// TestWarnsOfOpenServer has servers that everybody may use, and says which of them warn of that.
func TestWarnsOfOpenServer(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "auth.yaml")
	if err := os.WriteFile(file, []byte("anonymous: {role: reader}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		args []string
		want int
	}{
		"on loopback":          {nil, 0},
		"on all addresses":     {[]string{"--bind=0.0.0.0"}, 1},
		"with an auth file":    {[]string{"--bind=0.0.0.0", "--auth-file=" + file}, 0},
		"on loopback, by name": {[]string{"--bind=localhost"}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := startProgram(t, "polykit-cache", t.TempDir(), test.args...)
			if err := p.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			log := p.ends(t)
			if got := strings.Count(log, "everybody who can reach this address"); got != test.want {
				t.Errorf("it warns %d times, want %d:\n%s", got, test.want, log)
			}
		})
	}
}

// TestHangupReadsAuthFile changes the auth file and sends SIGHUP. One that is wrong is not taken.
func TestHangupReadsAuthFile(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "auth.yaml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	with := func(token string) string {
		return fmt.Sprintf("tokens:\n  - {name: x, sha256: %s, role: reader}\n", auth.HashToken(token))
	}
	write(with("one"))
	p := startProgram(t, "polykit-cache", t.TempDir(), "--auth-file="+file)
	status := func(token string) int {
		t.Helper()
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+p.address+"/v1/artifacts/0123456789abcdef0123456789abcdef", nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("Authorization", "Bearer "+token)
		response, err := http.DefaultTransport.RoundTrip(request)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		return response.StatusCode
	}
	if one, two := status("one"), status("two"); one != 404 || two != 401 {
		t.Errorf("before: %d, %d", one, two)
	}
	write(with("two"))
	if err := p.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	for status("two") != 404 { // the signal is on its way
		if t.Context().Err() != nil {
			t.Fatal("it is not read")
		}
	}
	if one := status("one"); one != 401 {
		t.Errorf("behind: %d", one)
	}
	write("tokens: nonsense\n")
	if err := p.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	if err := p.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if log := p.ends(t); !strings.Contains(log, "the auth file was read") {
		t.Errorf("the log is\n%s", log)
	}
}
