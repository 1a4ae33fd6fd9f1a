package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/client"
)

const (
	dashboardFile = "../../deploy/grafana-dashboard.json"
	rulesFile     = "../../deploy/prometheus-rules.yaml"
	ruleTestsFile = "../../deploy/prometheus-rules.test.yaml"
	scrapeFile    = "../../deploy/prometheus.yaml"
)

// dashboard is what Grafana shows.
type dashboard struct {
	UID         string
	Templating  struct{ List []variable }
	Annotations struct{ List []struct{ Name, Expr string } }
	Panels      []panel
}

type variable struct{ Name, Type, Definition string }

type panel struct {
	ID                       int
	Type, Title, Description string
	GridPos                  struct{ X, Y, W, H int }
	Datasource               struct{ UID string }
	FieldConfig              struct{ Defaults struct{ Unit string } }
	Targets                  []struct {
		RefID, Expr string
		Datasource  struct{ UID string }
	}
}

// expressions returns what it asks Prometheus for, by where it does.
func (d dashboard) expressions() map[string]string {
	all := map[string]string{}
	for _, a := range d.Annotations.List {
		all["annotation "+a.Name] = a.Expr
	}
	section := ""
	for _, p := range d.Panels {
		if p.Type == "row" {
			section = p.Title
		}
		for _, target := range p.Targets {
			all[section+", "+p.Title+", "+target.RefID] = target.Expr
		}
	}
	return all
}

// rules are those of the file for Prometheus.
type rules struct {
	Groups []struct {
		Name  string
		Rules []rule
	}
}

type rule struct {
	Record, Alert, Expr, For string
	Labels, Annotations      map[string]string
}

func readDashboard(t *testing.T) (d dashboard) {
	t.Helper()
	text, err := os.ReadFile(dashboardFile)
	check(t, err, json.Unmarshal(text, &d))
	return d
}

func readRules(t *testing.T) (all []rule) {
	t.Helper()
	text, err := os.ReadFile(rulesFile)
	check(t, err)
	var file rules
	check(t, yaml.Unmarshal(text, &file))
	for _, group := range file.Groups {
		all = append(all, group.Rules...)
	}
	return all
}

// startMeasured starts a server that can be scraped, and returns what makes happen what there are metrics of.
func startMeasured(t *testing.T) (o *operated, use func()) {
	t.Helper()
	o = startOperated(t, "--max-storage=8MiB", "--scrub-interval=1s")
	at := func(name string) string {
		return "http://" + o.address + "/v1/artifacts/" + cachetest.Key(name).String()
	}
	return o, func() {
		last := ""
		for i := range 4 { // more than may be stored
			last = fmt.Sprintf("measured-%d", i)
			o.asks(t, "PUT", at(last), bearer(writerOfTests), cachetest.Random(cachetest.Key(last), 3<<20), 201)
		}
		o.asks(t, "GET", at(last), bearer(writerOfTests), nil, 200)
		o.asks(t, "GET", at("missing"), bearer(writerOfTests), nil, 404)
		o.asks(t, "PUT", at("missing"), bearer(writerOfTests), cachetest.Random(cachetest.Key(last), 5000), 422) // it names another key
		o.asks(t, "GET", at(last), bearer(strangersToken), nil, 401)
		server, err := client.ParseServer("http://x:" + writerOfTests + "@" + o.address)
		check(t, err)
		overGRPC, err := client.NewGRPC(server, nil)
		check(t, err)
		download, err := overGRPC.Get(t.Context(), cachetest.Key(last), 0, artifact.Digest{})
		check(t, err)
		_, err = io.Copy(io.Discard, download.Body)
		check(t, err, download.Body.Close(), overGRPC.Close())
	}
}

// happened are expressions that give something only after all that startMeasured lets happen.
var happened = []string{
	`polykit_cache_hits_total == 2`,
	`polykit_cache_misses_total == 1`,
	`polykit_cache_uploads_total == 4`,
	`polykit_cache_evictions_total{reason="max-storage"} > 0`,
	`polykit_cache_evicted_bytes_total{reason="max-storage"} > 3e6`,
	`polykit_cache_verification_failures_total{reason="key"} == 1`,
	`polykit_cache_auth_failures_total{reason="unknown_token"} == 1`,
	`polykit_cache_requests_total{protocol="rest", method="PutArtifact", status="422"} == 1`,
	`polykit_cache_requests_total{protocol="grpc", method="GetArtifact", status="OK"} == 1`,
	`grpc_server_handled_total{grpc_method="GetArtifact", grpc_code="OK"} == 1`,
	`polykit_cache_sent_bytes_total{protocol="rest", method="GetArtifact"} > 3e6`,
}

// mayBeEmpty are the expressions of the dashboard that give nothing of a server that is well, and why.
var mayBeEmpty = map[string]string{
	"annotation Restarts": "the server did not restart",
}

var ownName = regexp.MustCompile(`\b(?:polykit_cache|grpc_server|go|process|promhttp)_[a-z0-9_]+\b`)

// namesIn returns the metrics that an expression asks for.
func namesIn(expression string) (names []string) {
	expression = regexp.MustCompile(`"[^"]*"`).ReplaceAllString(expression, "") // values of labels
	expression = regexp.MustCompile(`\b(?:by|on|without|ignoring) *\([^)]*\)`).ReplaceAllString(expression, "")
	expression = regexp.MustCompile(`\{[^}]*\}`).ReplaceAllString(expression, "") // names of labels
	expression = regexp.MustCompile(`\b[a-z]+:[a-z0-9_]+:[a-z0-9_]+\b`).ReplaceAllString(expression, "")
	for _, name := range ownName.FindAllString(expression, -1) {
		names = append(names, strings.TrimSuffix(name, "_bucket"))
	}
	return names
}

// TestDashboard compares dashboard and rules with the metrics that a server has, and looks at how they are made.
func TestDashboard(t *testing.T) {
	t.Parallel()
	o, use := startMeasured(t)
	use()
	text := ""
	for !strings.Contains(text, "polykit_cache_last_scrub_timestamp_seconds") { // the first scrub takes its time
		text, _ = o.asks(t, "GET", o.admin+"/metrics", nil, nil, 200)
	}
	there := map[string]bool{}
	for _, found := range regexp.MustCompile(`(?m)^# TYPE (\S+) `).FindAllStringSubmatch(text, -1) {
		there[found[1]] = true
	}

	d := readDashboard(t)
	shown := map[string]bool{}
	for where, expression := range d.expressions() {
		names := namesIn(expression)
		if len(names) == 0 {
			t.Errorf("%s asks for no metric: %s", where, expression)
		}
		for _, name := range names {
			shown[name] = true
			if !there[name] {
				t.Errorf("%s asks for %s, which there is not", where, name)
			}
		}
		if !strings.Contains(expression, `instance=~"$instance"`) {
			t.Errorf("%s does not choose a server", where)
		}
	}
	for name := range there {
		if strings.HasPrefix(name, "polykit_cache_") && !shown[name] {
			t.Errorf("the dashboard does not show %s", name)
		}
	}
	ids, taken := map[int]bool{}, map[[2]int]string{}
	for _, p := range d.Panels {
		if ids[p.ID] || p.ID == 0 {
			t.Errorf("panel %q has the id %d, as another has", p.Title, p.ID)
		}
		ids[p.ID] = true
		for x := range p.GridPos.W {
			for y := range p.GridPos.H {
				cell := [2]int{p.GridPos.X + x, p.GridPos.Y + y}
				if other := taken[cell]; other != "" || cell[0] >= 24 {
					t.Errorf("panel %q is where %q is, or outside", p.Title, other)
				}
				taken[cell] = p.Title
			}
		}
		if p.Type == "row" {
			continue
		}
		if p.Description == "" || p.Type != "table" && p.FieldConfig.Defaults.Unit == "" {
			t.Errorf("panel %q does not say what to do, or in which unit it is", p.Title)
		}
		for _, target := range p.Targets {
			if p.Datasource.UID != "${datasource}" || target.Datasource.UID != "${datasource}" {
				t.Errorf("panel %q asks a data source of its own", p.Title)
			}
		}
	}
	if names := fmt.Sprint(d.Templating.List); names != "[{datasource datasource } {instance query label_values(polykit_cache_build_info, instance)}]" || d.UID == "" {
		t.Errorf("the dashboard has the variables %s and the uid %q", names, d.UID)
	}

	tests, err := os.ReadFile(ruleTestsFile)
	check(t, err)
	for _, r := range readRules(t) {
		for _, name := range namesIn(r.Expr) {
			if !there[name] {
				t.Errorf("rule %s%s asks for %s, which there is not", r.Record, r.Alert, name)
			}
		}
		if r.Alert == "" {
			continue
		}
		if r.For == "" || !slices.Contains([]string{"critical", "warning", "info"}, r.Labels["severity"]) || r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
			t.Errorf("alert %s lacks for, severity, summary or description", r.Alert)
		}
		if !bytes.Contains(tests, []byte(`{labels: '{alertname="`+r.Alert+`"`)) {
			t.Errorf("no test has alert %s fire", r.Alert)
		}
	}
}

// TestPromtool has Prometheus' own tool check what deploy/ has for Prometheus, and what a server tells it.
func TestPromtool(t *testing.T) {
	t.Parallel()
	promtool := prometheusProgram(t, "promtool")
	o, use := startMeasured(t)
	use()
	metrics, _ := o.asks(t, "GET", o.admin+"/metrics", nil, nil, 200)
	for _, args := range [][]string{
		{"check", "config", "--syntax-only", scrapeFile},
		{"check", "rules", rulesFile},
		{"test", "rules", ruleTestsFile},
		{"check", "metrics"},
	} {
		command := exec.CommandContext(t.Context(), promtool, args...)
		command.Stdin = strings.NewReader(metrics)
		output, err := command.CombinedOutput()
		if err != nil || args[1] == "metrics" && len(output) > 0 { // what is against its conventions
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, output)
		}
	}
}

func prometheusProgram(t *testing.T, name string) string {
	t.Helper()
	program, err := exec.LookPath(name)
	if err != nil {
		skip(t, "no %s: %v", name, err)
	}
	return program
}

// scraper is a Prometheus that scrapes a server.
type scraper struct{ url string }

// startPrometheus starts Prometheus with what deploy/ has for it, but for the addresses and how often it looks.
func startPrometheus(t *testing.T, o *operated, args ...string) scraper {
	t.Helper()
	program := prometheusProgram(t, "prometheus")
	dir := t.TempDir()
	text, err := os.ReadFile(scrapeFile)
	check(t, err)
	config := string(text)
	for _, change := range [][2]string{
		{"scrape_interval: 15s", "scrape_interval: 1s"},
		{"evaluation_interval: 15s", "evaluation_interval: 1s"},
		{"cache.example.com:9090", strings.TrimPrefix(o.admin, "http://")},
		{"cache.example.com:8080", o.address},
		{"/etc/prometheus/polykit-cache.token", filepath.Join(dir, "token")},
	} {
		if strings.Count(config, change[0]) != 1 {
			t.Fatalf("%s has not one %q", scrapeFile, change[0])
		}
		config = strings.Replace(config, change[0], change[1], 1)
	}
	rules, err := os.ReadFile(rulesFile)
	path := filepath.Join(dir, "prometheus.yaml")
	check(t, err, os.WriteFile(path, []byte(config), 0o600), os.WriteFile(filepath.Join(dir, "prometheus-rules.yaml"), rules, 0o600),
		os.WriteFile(filepath.Join(dir, "token"), []byte(operatorToken), 0o600))
	address := freeAddress(t)
	command := exec.Command(program, append([]string{"--config.file=" + path, "--storage.tsdb.path=" + filepath.Join(dir, "data"),
		"--web.listen-address=" + address, "--log.format=logfmt"}, args...)...)
	stderr, err := command.StderrPipe()
	check(t, err, command.Start())
	lines, ended := bufio.NewScanner(stderr), make(chan struct{})
	var log strings.Builder
	for lines.Scan() {
		log.WriteString(lines.Text() + "\n")
		if strings.Contains(lines.Text(), "Server is ready") {
			break
		}
	}
	go func() {
		defer close(ended)
		for lines.Scan() {
		}
		command.Wait()
	}()
	t.Cleanup(func() {
		command.Process.Kill()
		<-ended
	})
	if !strings.Contains(log.String(), "Server is ready") {
		t.Fatalf("prometheus does not start:\n%s", &log)
	}
	return scraper{"http://" + address}
}

// asks asks the API of Prometheus for something, and decodes the data of the answer.
func (s scraper) asks(t *testing.T, path string, query url.Values, data any) {
	t.Helper()
	response, err := http.Get(s.url + path + "?" + query.Encode())
	check(t, err)
	defer response.Body.Close()
	answer := struct {
		Status, Error string
		Data          any
	}{Data: data}
	if err := json.NewDecoder(response.Body).Decode(&answer); err != nil || answer.Status != "success" {
		t.Fatalf("%s %v: %v %s", path, query, err, answer.Error)
	}
}

// gives says whether an expression gives anything now.
func (s scraper) gives(t *testing.T, expression string) bool {
	t.Helper()
	var data struct{ Result []any }
	s.asks(t, "/api/v1/query", url.Values{"query": {expression}}, &data)
	return len(data.Result) > 0
}

// waits waits until something holds, and says whether it does: until then nothing but time has to pass.
func waits(holds func() bool) bool {
	for deadline := time.Now().Add(time.Minute); !holds(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

// TestPrometheus has Prometheus scrape a server in both ways that deploy/prometheus.yaml has, and evaluate every rule and
// every expression of the dashboard: with native histograms, and without.
func TestPrometheus(t *testing.T) {
	t.Parallel()
	o, use := startMeasured(t)
	scrapers := map[string]scraper{
		"classic histograms": startPrometheus(t, o),
		"native histograms":  startPrometheus(t, o, "--enable-feature=native-histograms"),
	}
	for name, s := range scrapers {
		// What it sees once can't increase.
		if !waits(func() bool { return s.gives(t, `count(up == 1) == 2 and count(polykit_cache_hits_total == 0) == 2`) }) {
			t.Fatalf("%s: the server is not scraped", name)
		}
	}
	use()

	missing := map[string]string{}
	for _, expression := range happened {
		missing[expression] = expression
	}
	replacer := strings.NewReplacer("$instance", ".*", "$__rate_interval", "5m", "$__range", "5m")
	for where, expression := range readDashboard(t).expressions() {
		if missing[where] = replacer.Replace(expression); strings.Contains(missing[where], "$") {
			t.Errorf("%s has a variable that is not known: %s", where, expression)
		}
	}
	native := `histogram_count(polykit_cache_request_duration_seconds{method="GetArtifact", protocol="rest"}) == 3`
	for name, s := range scrapers {
		t.Run(name, func(t *testing.T) {
			missing := maps.Clone(missing)
			if name == "native histograms" {
				missing[native] = native
			}
			waits(func() bool {
				maps.DeleteFunc(missing, func(where, expression string) bool { return s.gives(t, expression) || mayBeEmpty[where] != "" })
				return len(missing) == 0
			})
			for where, expression := range missing {
				t.Errorf("%s gives nothing: %s", where, expression)
			}
			s.evaluates(t, readRules(t))
		})
	}
}

// evaluates checks that Prometheus evaluates all rules, and that no alert fires of a server that is well.
func (s scraper) evaluates(t *testing.T, want []rule) {
	t.Helper()
	type evaluated struct{ Name, Health, LastError, State string }
	var found []evaluated
	waits(func() bool {
		var data struct{ Groups []struct{ Rules []evaluated } }
		s.asks(t, "/api/v1/rules", nil, &data)
		found = nil
		for _, group := range data.Groups {
			found = append(found, group.Rules...)
		}
		return !slices.ContainsFunc(found, func(r evaluated) bool { return r.Health == "unknown" })
	})
	if len(found) != len(want) {
		t.Errorf("Prometheus has %d rules; want %d", len(found), len(want))
	}
	for _, r := range found {
		if r.Health != "ok" || r.State == "firing" {
			t.Errorf("%s is %s, with health %s %s", r.Name, r.State, r.Health, r.LastError)
		}
	}
	for _, r := range want {
		if r.Record != "" && !waits(func() bool { return s.gives(t, r.Record) }) {
			t.Errorf("%s gives nothing", r.Record)
		}
	}
}
