package deploy_test

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/dustin/go-humanize"
	"go.yaml.in/yaml/v4"

	"github.com/polykit/polykit-cache/internal/cachetest"
)

const url = "http://127.0.0.1:8080/v1/artifacts/"

// composed is what compose.yaml says of the service, in so far as it is needed to run it as Docker would. What is not here
// fails the test, so that nothing is forgotten.
type composed struct {
	Services map[string]struct {
		Image           string
		Build           map[string]string
		Ports           []string
		Environment     map[string]string
		Volumes         []string
		ReadOnly        bool     `yaml:"read_only"`
		CapDrop         []string `yaml:"cap_drop"`
		SecurityOpt     []string `yaml:"security_opt"`
		MemLimit        string   `yaml:"mem_limit"`
		Healthcheck     map[string]any
		StopGracePeriod string `yaml:"stop_grace_period"`
		Restart         string
	}
	Volumes map[string]any
}

// fromCompose returns how compose.yaml runs the server, and its health check.
func fromCompose(t *testing.T) (s settings, health []string) {
	t.Helper()
	text, err := os.ReadFile("compose.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var file composed
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	decoder.KnownFields(true)
	if err := decoder.Decode(&file); err != nil {
		t.Fatal(err)
	}
	service, ok := file.Services["polykit-cache"]
	if !ok || len(file.Services) != 1 {
		t.Fatalf("the services are %v", file.Services)
	}
	if _, err := os.Stat(filepath.Join(service.Build["context"], service.Build["dockerfile"])); err != nil {
		t.Error(err)
	}
	if !slices.Equal(service.CapDrop, []string{"ALL"}) || !slices.Equal(service.SecurityOpt, []string{"no-new-privileges:true"}) {
		t.Errorf("it drops %q and has %q", service.CapDrop, service.SecurityOpt)
	}
	memory, err := humanize.ParseBytes(strings.TrimSuffix(service.MemLimit, "m") + "MiB")
	if err != nil {
		t.Fatal(err)
	}
	s = settings{volumes: map[string]string{}, readOnly: service.ReadOnly, noNew: true, memory: int64(memory)}
	for name, value := range service.Environment {
		s.env = append(s.env, name+"="+value)
	}
	for _, volume := range service.Volumes {
		name, path, _ := strings.Cut(volume, ":")
		if _, declared := file.Volumes[name]; !declared {
			t.Errorf("the volume %s is not declared", name)
		}
		s.volumes[path] = volumeDir(t)
	}
	for _, arg := range service.Healthcheck["test"].([]any) {
		health = append(health, arg.(string))
	}
	if len(health) < 2 || health[0] != "CMD" {
		t.Fatalf("the health check is %q", health)
	}
	return s, health[1:]
}

// volumeDir returns a directory as a new volume is one: with the owner that the directory has in the image.
func volumeDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chown(dir, 65532, 65532); err != nil {
		t.Fatal(err)
	}
	return dir
}

func checkComposed(t *testing.T, built image) {
	s, health := fromCompose(t)
	c := built.run(t, s)
	c.confined()
	if got := c.exec(health...); got != "ready" {
		t.Errorf("the health check says %q", got)
	}
	client := c.client()
	key := cachetest.Key("container")
	content := cachetest.Random(key, 1<<20)
	if status := upload(t, client, key.String(), content); status != http.StatusCreated {
		t.Errorf("an upload got %d", status)
	}
	response, err := client.Get(url + key.String())
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if got, err := io.ReadAll(response.Body); err != nil || !bytes.Equal(got, content) {
		t.Errorf("what came down is not what went up: %d bytes, %v", len(got), err)
	}
	if got := c.exec("polykit-cache", "stat", key.String(), "--json"); !strings.Contains(got, key.String()) {
		t.Errorf("a command in the container says %s", got)
	}
	log := c.stop()
	for _, want := range []string{"memory_limit=256MiB", "gomemlimit=230MiB", ":8080 storage_dir=/var/lib/polykit-cache"} {
		if !strings.Contains(log, want) {
			t.Errorf("the log lacks %s:\n%s", want, log)
		}
	}
}

func checkTLS(t *testing.T, built image) {
	s, health := fromCompose(t)
	certificates := t.TempDir()
	cachetest.NewAuthority("container").Write(t, certificates, "cache.example.com")
	for _, name := range []string{"cert.pem", "key.pem"} {
		if err := os.Chown(filepath.Join(certificates, name), 65532, 65532); err != nil {
			t.Fatal(err)
		}
	}
	s.volumes["/certificates"] = certificates
	s.env = append(s.env, "POLYKIT_CACHE_PORT_NUMBER=8443", "POLYKIT_CACHE_TLS_CERT=/certificates/cert.pem", "POLYKIT_CACHE_TLS_KEY=/certificates/key.pem")
	c := built.run(t, s)
	if got := c.exec(health...); got != "ready" {
		t.Errorf("the health check says %q", got)
	}
	if log := c.stop(); !strings.Contains(log, "tls=true") || !strings.Contains(log, ":8443") {
		t.Errorf("it did not speak TLS there:\n%s", log)
	}
}

// checkMemory has clients make the server take as much memory as they can with its default flags and a memory limit in
// bytes: nearly as many connections as it has, and uploads with nearly as many files in the manifest as there may be.
func checkMemory(t *testing.T, built image, limit int64, connections, fileCount int) {
	s, health := fromCompose(t)
	s.env = append(s.env, "POLYKIT_CACHE_MAX_STORAGE=0")
	s.memory = limit
	c := built.run(t, s)
	client := c.client()

	for range connections {
		conn, err := c.dial(t.Context(), "tcp", "127.0.0.1:8080")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "GET /healthz HTTP/1.1\r\nHost: cache\r\n\r\n")
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || response.StatusCode != http.StatusOK {
			t.Fatalf("%v, %v", response, err)
		}
	}

	// Most uploads have the largest window that there may be, and one in five the largest manifest.
	content := make([]byte, 9<<20)
	rand.NewChaCha8([32]byte{}).Read(content)
	hash := sha256.Sum256(content)
	manifest := cachetest.Manifest(map[string]string{"data.bin": hex.EncodeToString(hash[:])}, len(content))
	large := cachetest.Store(cachetest.Tar(manifest, cachetest.Header("outputs/data.bin", 0, int64(len(content))), content))
	large[5] = 0x68 // a window of 8 MiB
	files := map[string]string{}
	for n := range fileCount {
		files[fmt.Sprintf("%080d", n)] = ""
	}
	many := cachetest.Rest(files)

	var uploads sync.WaitGroup
	var lock sync.Mutex
	statuses := map[string]int{}
	for n := range 40 {
		kind, rest := "large", large
		if n%5 == 0 {
			kind, rest = "many", many
		}
		uploads.Go(func() {
			key := cachetest.Key(fmt.Sprint(kind, n))
			status := upload(t, client, key.String(), slices.Concat(cachetest.Compress(cachetest.Metadata(key)), rest))
			lock.Lock()
			defer lock.Unlock()
			statuses[fmt.Sprint(kind, " ", status)]++
		})
	}
	uploads.Wait()
	if statuses["large 201"]+statuses["large 503"] != 32 || statuses["many 201"]+statuses["many 503"] != 8 || statuses["large 201"] == 0 || statuses["many 201"] == 0 {
		t.Errorf("the uploads got %v", statuses)
	}
	if got := c.exec(health...); got != "ready" {
		t.Errorf("the health check says %q", got)
	}
	t.Logf("the uploads got %v", statuses)
	c.stop()
}

// upload uploads an artifact and returns the status.
func upload(t *testing.T, client *http.Client, key string, content []byte) int {
	request, err := http.NewRequest(http.MethodPut, url+key, bytes.NewReader(content))
	if err != nil {
		t.Error(err)
		return 0
	}
	response, err := client.Do(request)
	if err != nil {
		t.Error(err)
		return 0
	}
	defer response.Body.Close()
	io.Copy(io.Discard, response.Body)
	return response.StatusCode
}
