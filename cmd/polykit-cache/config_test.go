package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/polykit/polykit-cache/internal/server"
)

var update = flag.Bool("update", false, "write deploy/polykit-cache.yaml anew")

// eachSetting calls f with every flag of a server that can be set in a file.
func eachSetting(f func(*pflag.Flag)) {
	serverSettings().VisitAll(func(flag *pflag.Flag) {
		if isSetting(flag) {
			f(flag)
		}
	})
}

// special are values of flags that can't be told from their types and defaults.
var special = map[string][3]string{
	"admin-address":   {"127.0.0.1:9091", "127.0.0.1:9092", "127.0.0.1:9093"},
	"bind":            {"127.0.0.2", "127.0.0.3", "127.0.0.4"},
	"trusted-proxies": {"10.0.0.0/8", "192.168.0.0/16", "127.0.0.1/32"},
	"scope-retention": {"a:keep-last=1", "a:keep-last=2", "a:keep-last=3"},
	"max-storage":     {"10GiB", "20GiB", "30%"},
	"verify-memory":   {"2GiB", "3GiB", "4GiB"},
	"durability":      {"none", "full", "none"},
	"log-format":      {"json", "text", "json"},
	"log-level":       {"debug", "warn", "error"},
}

// otherValues returns three values of a flag, one for each layer, which differ from those beside them.
func otherValues(t *testing.T, f *pflag.Flag) (values [3]string) {
	if values, known := special[f.Name]; known {
		return values
	}
	for i := range values {
		switch typ := f.Value.Type(); typ {
		case "string", "stringSlice", "stringArray":
			values[i] = f.Name + strconv.Itoa(i)
		case "bool":
			values[i] = strconv.FormatBool((f.DefValue == "true") == (i%2 == 1))
		case "int":
			n, _ := strconv.Atoi(f.DefValue)
			values[i] = strconv.Itoa(n + i + 1)
		case "duration":
			d, _ := time.ParseDuration(f.DefValue)
			values[i] = (d + time.Duration(i+1)*time.Second).String()
		case "size":
			var size sizeFlag
			if err := size.Set(f.DefValue); err != nil {
				size = 64 << 20 // within the bounds of all whose default depends on others
			}
			size += sizeFlag(i + 1)
			values[i] = size.String()
		case "size|percent":
			values[i] = strconv.Itoa(i+7) + "%"
		default:
			t.Fatalf("--%s is a %s: give three values for it in special", f.Name, typ)
		}
	}
	return values
}

// settingsNow returns what config prints with some arguments.
func settingsNow(t *testing.T, args ...string) map[string]struct {
	Value  any
	Origin string
} {
	t.Helper()
	status, stdout, stderr := polykit(t, append([]string{"config", "--json"}, args...)...)
	if status != 0 {
		t.Fatalf("config %q: exit status %d: %s", args, status, stderr)
	}
	var settings map[string]struct {
		Value  any
		Origin string
	}
	decoder := json.NewDecoder(strings.NewReader(stdout))
	decoder.UseNumber()
	if err := decoder.Decode(&settings); err != nil {
		t.Fatal(err)
	}
	return settings
}

// Every flag of a server can be set by a file, over that by the environment, and over that on the command line.
func TestSettingsOfEveryLayer(t *testing.T) {
	values := map[string][3]string{}
	var file strings.Builder
	var args []string
	lines := 0
	lineOf := map[string]int{}
	eachSetting(func(f *pflag.Flag) {
		values[f.Name] = otherValues(t, f)
		lines++
		lineOf[f.Name] = lines
		fmt.Fprintf(&file, "%s: %s\n", f.Name, values[f.Name][0])
		args = append(args, "--"+f.Name+"="+values[f.Name][2])
	})
	if lines < 40 {
		t.Errorf("looked at %d flags only", lines)
	}
	path := filepath.Join(t.TempDir(), "polykit-cache.yaml")
	if err := os.WriteFile(path, []byte(file.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	check := func(layer int, origin func(name string) string, args ...string) {
		t.Helper()
		settings := settingsNow(t, args...)
		if len(settings) != len(values) {
			t.Errorf("config prints %d settings, want %d", len(settings), len(values))
		}
		for name, want := range values {
			s := settings[name]
			got := s.Value
			if list, ok := got.([]any); ok && len(list) == 1 {
				got = list[0]
			}
			if fmt.Sprint(got) != want[layer] || s.Origin != origin(name) {
				t.Errorf("--%s is %v from %s, want %s from %s", name, got, s.Origin, want[layer], origin(name))
			}
		}
	}
	check(0, func(name string) string { return path + ":" + strconv.Itoa(lineOf[name]) }, "--config", path)
	check(2, func(string) string { return "flag" }, append([]string{"--config", path}, args...)...)
	for name, v := range values {
		t.Setenv(environmentName(name), v[1])
	}
	check(1, func(name string) string { return "environment " + environmentName(name) }, "--config", path)
	check(2, func(string) string { return "flag" }, append([]string{"--config", path}, args...)...)
}

// What config prints is a file with which config prints the same, and a server starts.
func TestSettingsRoundTrip(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	args := []string{"config", "--storage-dir=" + filepath.Join(dir, "8080", "a: b #c's"), "--max-size=1EiB", "--max-storage=12.5%", "--scope-retention=*:keep-last=1", "--scope-retention=pr-*:max-age=1h", "--bind=127.0.0.1", "--drain-size=9007199254740993", "--verify-memory=1GiB"}
	_, first, _ := polykit(t, args...)
	path := filepath.Join(dir, "polykit-cache.yaml")
	if err := os.WriteFile(path, []byte(first), 0o600); err != nil {
		t.Fatal(err)
	}
	status, second, stderr := polykit(t, "config", "--config", path)
	if status != 0 {
		t.Fatalf("exit status %d: %s", status, stderr)
	}
	without := func(text string) (lines []string) {
		for line := range strings.Lines(text) {
			value, _, _ := strings.Cut(line, " # ")
			if strings.HasPrefix(line, "storage-dir:") { // which has one itself
				value = line[:strings.LastIndex(line, " # ")]
			}
			lines = append(lines, value)
		}
		return lines
	}
	if a, b := strings.Join(without(first), "\n"), strings.Join(without(second), "\n"); a != b || a == "" {
		t.Errorf("with what config prints it prints\n%s\nwant\n%s", b, a)
	}
	startIn(t, nil, "--config", path)
	if _, err := os.Stat(filepath.Join(dir, "8080", "a: b #c's")); err != nil {
		t.Error(err)
	}
}

func TestSizeOfAConfigurationFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "polykit-cache.yaml")
	for size, want := range map[int]int{maxConfigFile: 0, maxConfigFile + 1: 2} {
		text := "port: 8081\n" + strings.Repeat("# nothing\n", maxConfigFile/10)
		if err := os.WriteFile(path, []byte(text[:size-1]+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if status, _, stderr := polykit(t, "config", "--config", path); status != want {
			t.Errorf("%d bytes: exit status %d, want %d: %s", size, status, want, stderr)
		}
	}
}

// Flags of kinds that the server has none of now: secrets are not told, and lists have defaults.
func TestSettingsOfOtherKinds(t *testing.T) {
	t.Parallel()
	newFlags := func() *pflag.FlagSet {
		f := pflag.NewFlagSet("", pflag.ContinueOnError)
		f.String("key", "", "")
		markSecret(f.Lookup("key"))
		f.Int("number", 0, "")
		markSecret(f.Lookup("number"))
		f.String("collector", "", "")
		f.StringSlice("urls", nil, "")
		f.String("path", "", "")
		f.String("digits", "8080", "")
		f.StringSlice("names", []string{"a", "b"}, "")
		f.Var(new(scopeRetentionFlag), "repeated", "")
		markSecret(f.Lookup("repeated"))
		f.Var(new(sizeFlag), "size", "")
		return f
	}
	f := newFlags()
	for name, value := range map[string]string{
		"key": "s3cret", "collector": "https://me:s3cret@example.com/x", "urls": "http://example.com,http://s3cret@example.com", "path": "/a@b://",
	} {
		if err := f.Set(name, value); err != nil {
			t.Fatal(err)
		}
	}
	setOrigin(f.Lookup("collector"), "x.yaml:1")
	settings := settingsOf(f, newFlags())
	var asYAML, asJSON bytes.Buffer
	if err := errors.Join(printSettings(&asYAML, settings), printSettingsJSON(&asJSON, settings)); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(asYAML.String()+asJSON.String(), "s3cret") {
		t.Errorf("a secret is told:\n%s%s", &asYAML, &asJSON)
	}
	want := `# collector: hidden, from x.yaml:1
digits: '8080' # default
# key: hidden, from flag
names: [a, b] # default
# number: hidden, from default
path: /a@b:// # flag
repeated: [] # default
# size: not set
# urls: hidden, from flag
`
	if asYAML.String() != want {
		t.Errorf("got\n%s\nwant\n%s", &asYAML, want)
	}
	if want := `"digits":{"value":"8080","origin":"default"}`; !strings.Contains(asJSON.String(), want) {
		t.Errorf("%s lacks %s", &asJSON, want)
	}
	// nor is it where it is wrong
	file := &configFile{path: "x.yaml", known: newFlags(), flags: newFlags()}
	file.read([]byte("number: 0123s3cret\nkey: [s3cret]\nurls: {s3cret: s3cret}\n"))
	file.read([]byte("number: 012345\nrepeated: s3cret\n"))
	for _, err := range file.problems {
		if text := err.Error(); strings.Contains(text, "s3cret") || strings.Contains(text, "012345") {
			t.Errorf("a secret is told: %s", text)
		}
	}
	if len(file.problems) != 5 {
		t.Errorf("%d problems, want 5: %v", len(file.problems), file.problems)
	}
	// and a list is what the file says, without the default
	file = &configFile{path: "x.yaml", known: newFlags(), flags: newFlags()}
	file.read([]byte("names: [c]\n"))
	if got := file.flags.Lookup("names").Value.String(); got != "[c]" || len(file.problems) > 0 {
		t.Errorf("names are %s, want [c]; %v", got, file.problems)
	}
}

// Values of flags whose defaults depend on others, or on the machine, as the example shows them.
var exampleValues = map[string]string{
	"hot-size":          "16MiB",
	"max-connections":   strconv.Itoa(server.DefaultConfig.MaxConnections),
	"max-manifest-size": "32MiB",
	"verify-memory":     "512MiB",
}

// deploy/polykit-cache.yaml names every setting with its default, and what it is.
func TestExampleOfAConfigurationFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join("..", "..", "deploy", "polykit-cache.yaml")
	status, _, stderr := polykit(t, "config", "--config", path)
	if status != 0 && !*update {
		t.Errorf("exit status %d: %s", status, stderr)
	}
	want := exampleConfig(t)
	if *update {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("%s is not what it should be: write it anew with go test ./cmd/polykit-cache -run '^%s$' -update", path, t.Name())
	}
	// Without the # in front of the settings it is a file that sets every one to its default.
	var uncommented strings.Builder
	for line := range strings.Lines(want) {
		if rest, isComment := strings.CutPrefix(line, "# "); !isComment {
			uncommented.WriteString(strings.TrimPrefix(line, "#"))
		} else {
			uncommented.WriteString("# " + rest)
		}
	}
	all := filepath.Join(t.TempDir(), "all.yaml")
	if err := os.WriteFile(all, []byte(uncommented.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	defaults := settingsNow(t)
	for name, s := range settingsNow(t, "--config", all) {
		if _, differs := exampleValues[name]; !differs && fmt.Sprint(s.Value) != fmt.Sprint(defaults[name].Value) {
			t.Errorf("%s is %v, but %v by default", name, s.Value, defaults[name].Value)
		}
		if !strings.HasPrefix(s.Origin, all) {
			t.Errorf("%s is not in the example", name)
		}
	}
}

const exampleHead = `# Settings of the server: an example to change, read by polykit-cache --config, once at its start.
# Each setting is here with its default, and does nothing as long as the # is in front of it. The
# environment and flags win over this file; "polykit-cache config" says what comes of all three.
`

// exampleConfig returns the example: of each setting what the help of the flag says, and its default.
func exampleConfig(t *testing.T) string {
	var example strings.Builder
	example.WriteString(exampleHead)
	described := serverSettings()
	cmd := configCommand() // which completes the settings
	cmd.SetOut(&bytes.Buffer{})
	cmd.SetArgs([]string{}) // nil would be those of the test
	if err := cmd.ExecuteContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, s := range settingsOf(cmd.Flags(), serverSettings()) {
		if value, has := exampleValues[s.name]; has {
			s.values = []string{value}
		}
		value, err := s.yaml()
		if err != nil {
			t.Fatal(err)
		}
		_, usage := pflag.UnquoteUsage(described.Lookup(s.name))
		example.WriteString("\n")
		column := 0
		for word := range strings.FieldsSeq(usage) {
			switch {
			case column == 0:
				example.WriteString("#")
				column = 1
			case column+1+len(word) > 99:
				example.WriteString("\n#")
				column = 1
			}
			example.WriteString(" " + word)
			column += 1 + len(word)
		}
		fmt.Fprintf(&example, "\n#%s: %s\n", s.name, value)
	}
	return example.String()
}
