package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// mostExposure is the most that a service of ours may be exposed as systemd counts it, from 0 to 10.
const mostExposure = 2.0

// output runs a program that a test needs and that may not be there, and returns what it says.
func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		skip(t, "no %s: %v", name, err)
	}
	said, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, said)
	}
	return string(said)
}

// TestUnits has systemd look at our units.
func TestUnits(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	program := filepath.Join(dir, "polykit-cache")
	check(t, os.WriteFile(program, nil, 0o755))
	var units []string
	for _, name := range []string{"polykit-cache.service", "polykit-cache.socket"} {
		content, err := os.ReadFile("../../deploy/" + name)
		check(t, err)
		// Where systemd looks for it, it is not installed.
		content = bytes.ReplaceAll(content, []byte("ExecStart=polykit-cache "), []byte("ExecStart="+program+" "))
		units = append(units, filepath.Join(dir, name))
		check(t, os.WriteFile(units[len(units)-1], content, 0o644))
	}
	if said := output(t, "systemd-analyze", append([]string{"verify", "--man=no"}, units...)...); strings.Contains(said, "polykit-cache") {
		t.Errorf("systemd-analyze verify:\n%s", said)
	}
	said := output(t, "systemd-analyze", "security", "--offline=true", "--no-pager", "../../deploy/polykit-cache.service")
	match := regexp.MustCompile(`Overall exposure level for polykit-cache\.service: ([0-9.]+)`).FindStringSubmatch(said)
	if match == nil {
		t.Fatalf("systemd-analyze security says no exposure:\n%s", said)
	}
	if exposure, err := strconv.ParseFloat(match[1], 64); err != nil || exposure >= mostExposure {
		t.Errorf("the service has an exposure of %s; want less than %v:\n%s", match[1], mostExposure, said)
	}
}
