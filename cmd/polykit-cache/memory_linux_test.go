package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// limited returns a program that starts polykit-cache in a cgroup of its own, with a memory limit in bytes. The
// program must have ended before the test ends.
func limited(t *testing.T, limit int64) string {
	t.Helper()
	memberships, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		skip(t, "there are no cgroups: %v", err)
	}
	parent, file := "", ""
	for line := range strings.Lines(string(memberships)) {
		_, membership, _ := strings.Cut(strings.TrimSpace(line), ":")
		switch controllers, path, _ := strings.Cut(membership, ":"); {
		case controllers == "memory":
			parent, file = filepath.Join("/sys/fs/cgroup/memory", path), "memory.limit_in_bytes"
		case controllers == "" && parent == "":
			parent, file = filepath.Join("/sys/fs/cgroup", path), "memory.max"
		}
	}
	group, err := os.MkdirTemp(parent, "polykit-cache-test-")
	if err != nil {
		skip(t, "can't make a cgroup: %v", err)
	}
	t.Cleanup(func() {
		if err := os.Remove(group); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(filepath.Join(group, file), fmt.Append(nil, limit), 0); err != nil {
		skip(t, "can't limit memory: %v", err)
	}
	script := filepath.Join(t.TempDir(), "limited")
	text := fmt.Sprintf("#!/bin/sh\necho $$ >%s/cgroup.procs && exec polykit-cache \"$@\"\n", group)
	if err := os.WriteFile(script, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return script
}

func TestMemoryLimit(t *testing.T) {
	for _, test := range []struct {
		name  string
		limit int64
		env   string
		args  []string
		want  []string
	}{
		{"enough", 2 << 30, "", nil,
			[]string{"memory_limit=2GiB", "gomemlimit=1843MiB", "verify_memory=512MiB", "max_manifest_size=32MiB", "hot_size=16MiB"}},
		{"little", 256 << 20, "", nil,
			[]string{"memory_limit=256MiB", "gomemlimit=230MiB", "verify_memory=128MiB", "max_manifest_size=8MiB", "hot_size=8MiB", "max_connections=1365", "max_uploads=6"}},
		{"least", leastMemory, "", nil, []string{"memory_limit=128MiB", "gomemlimit=115MiB"}},
		{"too little", leastMemory - 1<<20, "", nil, []string{"memory_limit=127MiB", `level=WARN msg="the memory limit is so low`}},
		{"flags win", 256 << 20, "", []string{"--verify-memory=500MiB", "--max-manifest-size=32MiB", "--hot-size=1MiB", "--max-connections=7"},
			[]string{"verify_memory=500MiB", "max_manifest_size=32MiB", "hot_size=1MiB", "max_connections=7", `level=WARN msg="clients can make the server take more`}},
		{"large documents need more", 256 << 20, "", []string{"--max-manifest-size=32MiB"},
			[]string{"verify_memory=357320KiB", `level=WARN msg="clients can make the server take more`}},
		{"GOMEMLIMIT wins", 256 << 20, "GOMEMLIMIT=100MiB", nil, []string{"memory_limit=256MiB", "gomemlimit=100MiB", "verify_memory=128MiB"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			env := append(os.Environ(), "GORACE=atexit_sleep_ms=0")
			if test.env != "" {
				env = append(env, test.env)
			}
			p, err := spawn(limited(t, test.limit), env, append([]string{"--storage-dir", t.TempDir(), "--max-connections=0"}, test.args...)...)
			if err != nil {
				t.Fatal(err)
			}
			p.listen()
			p.Process.Signal(os.Interrupt)
			log := p.ends(t)
			for _, want := range test.want {
				if !strings.Contains(log, want) {
					t.Errorf("the log lacks %s:\n%s", want, log)
				}
			}
			if !strings.Contains(strings.Join(test.want, ""), "WARN") && strings.Contains(log, "level=WARN") {
				t.Errorf("the log warns:\n%s", log)
			}
		})
	}
}
