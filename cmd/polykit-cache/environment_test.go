package main

import (
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// kubernetesLinks returns what Kubernetes sets in the environment of a pod for a Service called polykit-cache whose ports
// are called http and metrics.
func kubernetesLinks() []string {
	const host = "10.96.0.17"
	links := []string{
		"POLYKIT_CACHE_SERVICE_HOST=" + host,
		"POLYKIT_CACHE_SERVICE_PORT=8080",
		"POLYKIT_CACHE_SERVICE_PORT_HTTP=8080",
		"POLYKIT_CACHE_SERVICE_PORT_METRICS=9090",
		"POLYKIT_CACHE_PORT=tcp://" + host + ":8080",
	}
	for _, port := range []int{8080, 9090} {
		p := strconv.Itoa(port)
		of := "POLYKIT_CACHE_PORT_" + p + "_TCP"
		links = append(links, of+"=tcp://"+host+":"+p, of+"_PROTO=tcp", of+"_PORT="+p, of+"_ADDR="+host)
	}
	return links
}

// Beside a Service called polykit-cache a server has the settings that it has elsewhere, and says nothing of what
// Kubernetes sets.
func TestServerBesideAServiceOfItsName(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "store")
	address, log := startIn(t, append(kubernetesLinks(), "POLYKIT_CACHE_STORAGE_DIR="+dir, "POLYKIT_CACHE_TOKEN=abc"))
	host, port, err := net.SplitHostPort(address)
	if err != nil || host != "127.0.0.1" || port == "8080" || port == "9090" {
		t.Errorf("the server listens on %s, %v; want a free port of 127.0.0.1", address, err)
	}
	if strings.Contains(log, "environment") {
		t.Errorf("the log tells of the environment:\n%s", log)
	}
	if _, err := os.Stat(dir); err != nil {
		t.Errorf("what else is in the environment was not read: %v", err)
	}
}

// With these variables all settings are the defaults, the port above all, which the test above has to give.
func TestServiceLinksSetNothing(t *testing.T) {
	defaults := settingsNow(t)
	for _, link := range kubernetesLinks() {
		name, value, _ := strings.Cut(link, "=")
		t.Setenv(name, value)
	}
	for name, s := range settingsNow(t) {
		if s.Origin != "default" {
			t.Errorf("--%s is %v from %s, want %v", name, s.Value, s.Origin, defaults[name].Value)
		}
	}
}

func TestServerWarnsOfVariablesThatNobodyReads(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "store")
	_, log := startIn(t, []string{"POLYKIT_CACHE_MAX_STORAG=s3cret"}, "--storage-dir", dir)
	const want = "the environment variable POLYKIT_CACHE_MAX_STORAG is not read by any flag; did you mean POLYKIT_CACHE_MAX_STORAGE, which sets --max-storage?"
	if strings.Count(log, "environment variable") != 1 || !strings.Contains(log, want) || strings.Contains(log, "s3cret") {
		t.Errorf("the log has not just one warning %q:\n%s", want, log)
	}
}

func TestEnvironmentWarnings(t *testing.T) {
	t.Parallel()
	const see = "see --help for those that are"
	for variable, want := range map[string]string{
		"POLYKIT_CACHE_MAX_STORAG=1GiB":        "POLYKIT_CACHE_MAX_STORAGE, which sets --max-storage?",
		"POLYKIT_CACHE_STORAGEDIR=x":           "POLYKIT_CACHE_STORAGE_DIR, which sets --storage-dir?",
		"POLYKIT_CACHE_max_size=x":             "POLYKIT_CACHE_MAX_SIZE, which sets --max-size?",
		"POLYKIT_CACHE_CONFIGS=x":              "POLYKIT_CACHE_CONFIG, which sets --config?",
		"POLYKIT_CACHE_PORT=8081":              "--port is set by POLYKIT_CACHE_PORT_NUMBER",
		"POLYKIT_CACHE_WHATEVER_THIS_IS=x":     see,
		"POLYKIT_CACHE_=x":                     see,
		"POLYKIT_CACHE_DRY_RUN=true":           see, // which is only given on the command line
		"POLYKIT_CACHE_MAX_STORAG=":            "",  // as good as not set
		"POLYKIT_CACHE_MAX_STORAGE=1GiB":       "",
		"POLYKIT_CACHE_PORT=tcp://10.0.0.1:80": "",
		"POLYKIT_CACHE_PORT=udp://10.0.0.1:80": "",
		"POLYKIT_CACHE_REDIS_SERVICE_HOST=x":   "", // of a Service called polykit-cache-redis
		"POLYKIT_CACHE_TOKEN=x":                "",
		"POLYKIT_CACHE_TOKEN_FILE=x":           "",
		"POLYKIT_CACHE_SERVER=x":               "",
		"POLYKIT_CACHE_URL=x":                  "",
		"POLYKIT_CACHE_TEST_KILLS=1":           "",
		"POLYKIT_CACHED=x":                     "",
		"PATH=/bin":                            "",
	} {
		got := environmentWarnings([]string{variable})
		if want == "" && len(got) > 0 || want != "" && (len(got) != 1 || !strings.HasSuffix(got[0], want)) {
			t.Errorf("%s: %q, want %q", variable, got, want)
		}
	}
	for _, link := range kubernetesLinks() {
		if got := environmentWarnings([]string{link}); len(got) > 0 {
			t.Errorf("%s: %q", link, got)
		}
	}
}
