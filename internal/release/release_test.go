package main

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// repository returns a repository with one commit, of the files that this one has, and of a changelog if it is not "". The
// same files and changelog give the same commit.
func repository(t *testing.T, changelog string) string {
	t.Helper()
	if _, err := exec.LookPath("git"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip("there is no git, which releases need")
	}
	dir := t.TempDir()
	source := filepath.Join("..", "..")
	for name := range strings.SplitSeq(strings.TrimSuffix(git(t, source, "ls-files", "-z", "--cached", "--others", "--exclude-standard"), "\x00"), "\x00") {
		content, err := os.ReadFile(filepath.Join(source, name))
		if os.IsNotExist(err) {
			continue // removed, and not committed yet
		}
		if err != nil {
			t.Fatal(err)
		}
		if name == "CHANGELOG.md" && changelog != "" {
			content = []byte(changelog)
		}
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	git(t, dir, "init", "--quiet")
	git(t, dir, "add", "--all")
	git(t, dir, "commit", "--quiet", "--message", "all")
	return dir
}

func git(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.Command("git", append([]string{"-C", dir, "-c", "user.name=Test", "-c", "user.email=test@example.com", "-c", "core.autocrlf=false"}, args...)...)
	cmd.Env = append(os.Environ(), "GIT_AUTHOR_DATE=2026-01-02T03:04:06Z", "GIT_COMMITTER_DATE=2026-01-02T03:04:06Z")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("git %q: %v", args, err)
	}
	return string(out)
}

const changelog = "# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-01-02\n\n### Added\n\n- Everything.\n"

// The same commit gives the same files, wherever it is built, and the tag is the version in all of them.
func TestRelease(t *testing.T) {
	platform := runtime.GOOS + "/" + runtime.GOARCH
	name := "polykit-cache_1.2.3_" + runtime.GOOS + "_" + runtime.GOARCH
	sums := []string{}
	for range 2 {
		dir := repository(t, changelog)
		git(t, dir, "tag", "v1.2.3")
		out := filepath.Join(t.TempDir(), "dist")
		// As make release runs it: with the race detector it would take ten times as long to compress what it built.
		run := exec.Command("go", "run", "./internal/release", "-out", out, platform)
		run.Dir, run.Stdout, run.Stderr = dir, t.Output(), t.Output()
		run.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS="+os.Getenv("GOFLAGS")+" -trimpath") // as the binary is compiled
		if err := run.Run(); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(filepath.Join(out, "SHA256SUMS"))
		if err != nil {
			t.Fatal(err)
		}
		sums = append(sums, string(text))
		if len(sums) > 1 || runtime.GOOS == "windows" {
			continue
		}

		files := untar(t, filepath.Join(out, name+".tar.gz"))
		for _, document := range documents {
			if len(files[name+"/"+document]) == 0 {
				t.Errorf("the archive lacks %s", document)
			}
		}
		program := filepath.Join(t.TempDir(), "polykit-cache")
		if err := os.WriteFile(program, files[name+"/polykit-cache"], 0o755); err != nil {
			t.Fatal(err)
		}
		if version, err := exec.Command(program, "--version").Output(); err != nil || !strings.HasPrefix(string(version), "polykit-cache v1.2.3 go") {
			t.Errorf("the program says that it is %q, %v", version, err)
		}
		text, err = os.ReadFile(filepath.Join(out, name+".cdx.json"))
		if err != nil {
			t.Fatal(err)
		}
		var list struct {
			Metadata struct {
				Component struct{ Name, Version string }
			}
			Components []struct{ Name string }
		}
		if err := json.Unmarshal(text, &list); err != nil {
			t.Fatal(err)
		}
		if list.Metadata.Component.Version != "v1.2.3" || len(list.Components) < 20 {
			t.Errorf("the list of modules is of version %q and has %d", list.Metadata.Component.Version, len(list.Components))
		}
	}
	if sums[0] != sums[1] || strings.Count(sums[0], "\n") != 2 {
		t.Errorf("two builds of a commit give\n%sand\n%s", sums[0], sums[1])
	}
}

// What may not be released is refused before anything is built.
func TestReleaseRefused(t *testing.T) {
	for name, test := range map[string]struct {
		prepare func(dir string)
		want    string
	}{
		"no tag":      {func(string) {}, "the commit has no tag"},
		"no section":  {func(dir string) { git(t, dir, "tag", "v1.2.4") }, "CHANGELOG.md has no section of v1.2.4"},
		"no commit":   {func(dir string) { git(t, dir, "tag", "v1.2.3"); os.WriteFile(filepath.Join(dir, "a.go"), nil, 0o644) }, "changes that are not committed"},
		"not its own": {func(dir string) { git(t, dir, "tag", "1.2.3") }, "the commit has no tag"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := repository(t, changelog)
			test.prepare(dir)
			out := filepath.Join(t.TempDir(), "dist")
			r := release{source: dir, out: out, platforms: platforms, log: t.Output()}
			if err := r.build(t.Context()); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("the error is %v, want %s", err, test.want)
			}
			if _, err := os.Stat(out); !os.IsNotExist(err) {
				t.Errorf("%s is there: %v", out, err)
			}
		})
	}
}

func TestCheckChangelog(t *testing.T) {
	t.Parallel()
	for version, want := range map[string]string{
		"v1.2.3": "", "v1.2": "no section of v1.2:", "v0.9.0": "says nothing of v0.9.0", "v0.8.0": "no section of v0.8.0:", "v1x2.3": "no section",
	} {
		err := checkChangelog(changelog+"\n## [0.9.0] - 2025-01-02\n\n## [0.8.0]\n\n- No date.\n", version)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", version, err, want)
		}
	}
}

// The project's own changelog has the section that the next release is made of.
func TestOwnChangelog(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(filepath.Join("..", "..", "CHANGELOG.md"))
	if err != nil {
		t.Fatal(err)
	}
	released := strings.Replace(string(text), "## [Unreleased]", "## [9.9.9] - 2026-01-02", 1)
	if err := checkChangelog(released, "v9.9.9"); err != nil && !strings.Contains(string(text), "\n## [1.") {
		t.Error(err)
	}
}

func TestArchives(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	files := []string{filepath.Join(dir, "polykit-cache.exe"), filepath.Join(dir, "README.md")}
	for _, file := range files {
		if err := os.WriteFile(file, []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	modified := time.Date(2026, 1, 2, 3, 4, 6, 0, time.UTC)
	path := filepath.Join(dir, "a.zip")
	if err := writeZip(path, "top", files, modified); err != nil {
		t.Fatal(err)
	}
	r, err := zip.OpenReader(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for n, want := range []struct {
		name string
		mode os.FileMode
	}{{"top/polykit-cache.exe", 0o755}, {"top/README.md", 0o644}} {
		file := r.File[n]
		if file.Name != want.name || file.Mode() != want.mode || !file.Modified.Equal(modified) {
			t.Errorf("%s, %v, %v; want %v", file.Name, file.Mode(), file.Modified, want)
		}
		content, err := file.Open()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(content); err != nil || string(got) != files[n] {
			t.Errorf("%q, %v", got, err)
		}
	}
}

// untar returns the files of an archive.
func untar(t *testing.T, path string) map[string][]byte {
	t.Helper()
	compressed, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	archive, err := gzip.NewReader(bytes.NewReader(compressed))
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for r := tar.NewReader(archive); ; {
		header, err := r.Next()
		if err == io.EOF {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[header.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}
