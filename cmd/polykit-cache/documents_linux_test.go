package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// documented are the documents whose console blocks TestDocuments runs, each in a shell of its own, from top to bottom.
var documented = []string{"README.md", "docs/operations.md"}

// notRun are the commands that it does not run, by how they begin, and why.
var notRun = map[string]string{
	"go run ./cmd/polykit-cache":                "takes the port that it takes, which may not be free; all tests run the server",
	"make test":                                 "runs this test",
	"polykit-cache --bind 0.0.0.0 --tls-cert":   "is what TestHangup and server_start.txtar do",
	"polykit-cache list --server https://cache": "asks a server of this name; client_tls.txtar does that of another one",
	"polykit-cache --storage-dir /tmp/bench":    "is for the three below",
	"polykit-cache bench":                       "loads the machine for half a minute; bench.txtar does so for a moment",
	"make image":                                "needs a Docker daemon; TestContainer builds the image with buildah",
	"docker run":                                "the same; TestContainer runs it with runc",
	"docker compose":                            "the same; TestContainer does what compose.yaml says",
	"sudo dpkg -i":                              "changes the machine; TestPackages and TestUnits look into what it would install",
	"sudo systemctl enable":                     "needs systemd as the first process; TestUnits has systemd check the units",
	"systemctl status":                          "the same; TestServiceManagerIsTold reads what is shown there",
	"kubectl kustomize":                         "TestKubernetes does that without kubectl",
	"kubectl apply":                             "needs a cluster; TestKubernetes checks what is applied as one would",
	"cp deploy/nginx.conf":                      "changes the machine; TestProxy runs nginx with this file",
	"nginx -t":                                  "the same",
	"OTEL_EXPORTER_OTLP_ENDPOINT=":              "needs a collector; TestTraces is one",
	"polykit build --remote-cache-url":          "is a program of others",
}

// command is a command in a console block: its lines, and those that it prints, where the document says so.
type command struct {
	at     string // its document and line
	text   string
	prints string
}

// commandsIn returns the commands in the console blocks of a document.
func commandsIn(name, text string) []command {
	var commands []command
	block, number := false, 0
	for line := range strings.Lines(text) {
		number++
		switch start, is := strings.CutPrefix(line, "$ "); {
		case strings.HasPrefix(line, "```"):
			block = line == "```console\n"
		case !block:
		case is:
			commands = append(commands, command{at: fmt.Sprintf("%s:%d", name, number), text: start})
		case strings.HasPrefix(line, "  "):
			commands[len(commands)-1].text += line
		default:
			commands[len(commands)-1].prints += line
		}
	}
	return commands
}

// serves matches commands that are servers. Their settings, without a remark behind them, are to be checked.
var serves = regexp.MustCompile(`^polykit-cache (--[^#\n]*[^# \n])`)

// TestDocuments runs the commands that documents show, as they stand there but for addresses and directories.
func TestDocuments(t *testing.T) {
	t.Parallel()
	for _, program := range []string{"bash", "base64", "curl", "diff", "grpcurl", "jq"} {
		if _, err := exec.LookPath(program); err != nil {
			skip(t, "%v: install it", err)
		}
	}
	unused := map[string]bool{}
	for start := range notRun {
		unused[start] = true
	}
	for _, name := range documented {
		text, err := os.ReadFile("../../" + name)
		check(t, err)
		var run []command
	commands:
		for _, c := range commandsIn(name, string(text)) {
			for start := range notRun {
				if strings.HasPrefix(c.text, start) {
					delete(unused, start)
					continue commands
				}
			}
			run = append(run, c)
		}
		if len(run) == 0 {
			t.Errorf("%s has no command that could be run", name)
		}
		t.Run(filepath.Base(name), func(t *testing.T) {
			t.Parallel()
			runDocumented(t, string(text), run)
		})
	}
	for start := range unused {
		t.Errorf("no document has the command %q that is not run", start)
	}
}

// runDocumented runs the commands of a document in a directory that has what it says is there.
func runDocumented(t *testing.T, document string, commands []command) {
	dir, admin := t.TempDir(), freeAddress(t)
	server := startProgram(t, "polykit-cache", filepath.Join(dir, "store"), "--admin-address="+admin)
	check(t, os.CopyFS(filepath.Join(dir, "proto"), os.DirFS("../../proto")))
	stored := func(dir string, key artifact.Key) string {
		digits := key.String()
		return dir + "/" + digits[:2] + "/" + digits[2:4] + "/" + digits + ".zst"
	}
	ofServer, ofOther, ofClient := cachetest.Key("of a server"), cachetest.Key("of another"), cachetest.Key("of a client")
	files := map[string]string{
		"keys.txt":                      ofServer.String() + "\n" + ofOther.String() + "\n",
		stored("var/polykit", ofServer): string(cachetest.Random(ofServer, 1000)),
		stored("var/other", ofOther):    string(cachetest.Random(ofOther, 1000)),
		".cache/polykit/remote/0123456789abcdef/" + ofClient.String()[:2] + "/" + ofClient.String()[2:] + ".zst": string(cachetest.Random(ofClient, 1000)),
	}
	if _, example, found := strings.Cut(document, "```yaml\nstorage-dir: "); found {
		example, _, _ = strings.Cut(example, "```")
		files["polykit-cache.yaml"] = "storage-dir: " + example
	}
	for name, content := range files {
		path := filepath.Join(dir, name)
		check(t, os.MkdirAll(filepath.Dir(path), 0o755))
		check(t, os.WriteFile(path, []byte(content), 0o644))
	}
	here := strings.NewReplacer("localhost:8080", server.address, "127.0.0.1:9090", admin, "/tmp/", dir+"/tmp/", "/var/cache/", dir+"/var/")
	var script strings.Builder
	for _, c := range commands {
		text := here.Replace(c.text)
		if match := serves.FindStringSubmatch(text); match != nil {
			text = "serves " + match[1] + "\n"
		}
		fmt.Fprintf(&script, ": %s\n", c.at)
		if c.prints == "" {
			script.WriteString(text)
		} else {
			fmt.Fprintf(&script, "{ %s} >printed\ndiff - printed <<'END'\n%sEND\n", text, c.prints)
		}
	}
	script.WriteString("[ ! -e copy.zst ] || cmp artifact.zst copy.zst\n[ ! -e tmp/proto ] || diff -r proto tmp/proto\n")
	// curl says with --fail that it failed; and of a server with these settings it is enough that it starts and ends well.
	const prelude = `
set -e -o pipefail
curl() { command curl --silent --show-error --fail "$@"; }
serves() {
	[ -p log ] || mkfifo log
	polykit-cache --port 0 --storage-dir other-store "$@" >log &
	local server=$!
	while read -r line; do
		case $line in *msg=listening*) kill -TERM "$server" ;; esac
	done <log
	wait "$server"
}
set -v
`
	file := filepath.Join(dir, "script")
	check(t, os.WriteFile(file, []byte(prelude+script.String()), 0o644))
	bash := exec.Command("bash", file)
	bash.Dir = dir
	bash.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0", "HOME="+dir, "POLYKIT_CACHE_SERVER=http://"+server.address)
	out, err := bash.CombinedOutput()
	if err != nil {
		t.Errorf("the last of these commands: %v\n%s", err, out)
	}
	t.Logf("%s", out)
	check(t, server.Process.Signal(syscall.SIGTERM))
	server.ends(t)
}
