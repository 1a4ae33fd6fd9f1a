// Command release builds what a release consists of into a directory, dist:
//
//	go run ./internal/release             the tag of the commit that is checked out
//	go run ./internal/release -snapshot   whatever is there, to try it
//
// For each platform there is an archive with the program, README, LICENSE and CHANGELOG, and a list of the modules that
// the program was built from (an SBOM of CycloneDX); SHA256SUMS is over all of them. The same commit gives the same bytes,
// whoever builds it, whenever and where: nothing of the machine is in a binary, and files in archives have the time of
// the commit.
//
// The tag is the one source of the version: go build finds it in the repository, and this looks it up in the binary. A
// version of which CHANGELOG.md has no section is not released.
package main

import (
	"context"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// platforms are what a release is for, as GOOS/GOARCH.
var platforms = []string{"linux/amd64", "linux/arm64", "darwin/amd64", "darwin/arm64", "windows/amd64", "windows/arm64"}

// documents are the files of the repository that an archive has beside the program.
var documents = []string{"README.md", "LICENSE.md", "CHANGELOG.md"}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	r := release{platforms: platforms, log: os.Stdout}
	flag.StringVar(&r.source, "source", ".", "`directory` of the repository")
	flag.StringVar(&r.out, "out", "dist", "`directory` to build into, which must be empty or not exist")
	flag.BoolVar(&r.snapshot, "snapshot", false, "build what is there, though it has no tag")
	flag.Parse()
	if flag.NArg() > 0 {
		r.platforms = flag.Args()
	}
	if err := r.build(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "release:", err)
		os.Exit(1)
	}
}

// release is what is built.
type release struct {
	source    string // directory of the repository
	out       string // directory for the files
	snapshot  bool   // of what has no tag
	platforms []string
	log       io.Writer

	version string    // "v1.2.3", or of a snapshot what git calls the commit
	time    time.Time // of the commit
}

func (r *release) build(ctx context.Context) error {
	if err := r.identify(ctx); err != nil {
		return err
	}
	out, err := filepath.Abs(r.out) // since some commands run in the source
	if err != nil {
		return err
	}
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	if entries, err := os.ReadDir(out); err != nil || len(entries) > 0 {
		return errors.Join(err, fmt.Errorf("%s is not empty: remove what is in it", r.out))
	}
	work, err := os.MkdirTemp("", "release-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	for _, platform := range r.platforms {
		if err := r.buildFor(ctx, platform, work, out); err != nil {
			return fmt.Errorf("%s: %w", platform, err)
		}
	}
	return sum(out)
}

// identify finds the version and the time of the commit, and whether it may be released.
func (r *release) identify(ctx context.Context) error {
	seconds, err := r.command(ctx, nil, "git", "log", "-1", "--format=%ct")
	if err != nil {
		return err
	}
	unix, err := strconv.ParseInt(seconds, 10, 64)
	if err != nil {
		return err
	}
	r.time = time.Unix(unix, 0).UTC()
	if r.snapshot {
		r.version, err = r.command(ctx, nil, "git", "describe", "--tags", "--always", "--dirty")
		return err
	}
	if r.version, err = r.command(ctx, nil, "git", "describe", "--tags", "--exact-match", "--match", "v*"); err != nil {
		return fmt.Errorf("the commit has no tag, so there is nothing to release; tag it, or build a snapshot: %w", err)
	}
	if changes, err := r.command(ctx, nil, "git", "status", "--porcelain"); err != nil || changes != "" {
		return errors.Join(err, fmt.Errorf("there are changes that are not committed: commit or remove them\n%s", changes))
	}
	changelog, err := os.ReadFile(filepath.Join(r.source, "CHANGELOG.md"))
	if err != nil {
		return err
	}
	return checkChangelog(string(changelog), r.version)
}

// checkChangelog returns an error if a changelog has no section, with a date and a text, of a version.
func checkChangelog(changelog, version string) error {
	number := strings.TrimPrefix(version, "v")
	heading := regexp.MustCompile(`(?m)^## \[` + regexp.QuoteMeta(number) + `\] - \d{4}-\d\d-\d\d$`)
	place := heading.FindStringIndex(changelog)
	if place == nil {
		return fmt.Errorf("CHANGELOG.md has no section of %s: make one of Unreleased, with the heading \"## [%s] - YYYY-MM-DD\"", version, number)
	}
	text, _, _ := strings.Cut(changelog[place[1]:], "\n## ")
	if !strings.Contains(text, "\n- ") {
		return fmt.Errorf("CHANGELOG.md says nothing of %s: list what changed", version)
	}
	return nil
}

// buildFor builds the files for one platform.
func (r *release) buildFor(ctx context.Context, platform, work, out string) error {
	goos, goarch, ok := strings.Cut(platform, "/")
	if !ok {
		return errors.New("a platform must be GOOS/GOARCH")
	}
	program := "polykit-cache"
	if goos == "windows" {
		program += ".exe"
	}
	binary := filepath.Join(work, goos, goarch, program)
	fmt.Fprintf(r.log, "building %s for %s\n", r.version, platform)
	env := []string{"CGO_ENABLED=0", "GOOS=" + goos, "GOARCH=" + goarch}
	if _, err := r.command(ctx, env, "go", "build", "-trimpath", "-buildvcs=true", "-ldflags", "-s -w", "-o", binary, "./cmd/polykit-cache"); err != nil {
		return err
	}
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		return err
	}
	if got := info.Main.Version; got != r.version && !r.snapshot {
		return fmt.Errorf("the binary calls itself %s, not %s: go build did not find the tag", got, r.version)
	}

	name := strings.Join([]string{"polykit-cache", strings.TrimPrefix(r.version, "v"), goos, goarch}, "_")
	contents := []string{binary}
	for _, document := range documents {
		contents = append(contents, filepath.Join(r.source, document))
	}
	if goos == "windows" {
		err = writeZip(filepath.Join(out, name+".zip"), name, contents, r.time)
	} else {
		err = writeTar(filepath.Join(out, name+".tar.gz"), name, contents, r.time)
	}
	if err != nil {
		return err
	}
	// The tool is compiled as the binary is, so that what both need is compiled once. Without a serial number and the
	// time, which would be others each time.
	env = []string{"CGO_ENABLED=0", "GOFLAGS=" + os.Getenv("GOFLAGS") + " -trimpath"}
	_, err = r.command(ctx, env, "go", "tool", "-modfile=.tools/sbom.mod", "cyclonedx-gomod", "bin", "-json", "-std", "-noserial", "-notimestamp",
		"-version", r.version, "-output", filepath.Join(out, name+".cdx.json"), binary)
	return err
}

// command runs a command in the source, with variables beside the environment, and returns what it prints.
func (r *release) command(ctx context.Context, env []string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir = r.source
	cmd.Env = append(os.Environ(), env...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	stdout, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return strings.TrimSpace(string(stdout)), nil
}

// sum writes SHA256SUMS of the files in a directory, as sha256sum --check reads it.
func sum(dir string) error {
	entries, err := os.ReadDir(dir) // sorted
	if err != nil {
		return err
	}
	var sums strings.Builder
	for _, entry := range entries {
		file, err := os.Open(filepath.Join(dir, entry.Name()))
		if err != nil {
			return err
		}
		hash := sha256.New()
		_, err = io.Copy(hash, file)
		file.Close()
		if err != nil {
			return err
		}
		fmt.Fprintf(&sums, "%s  %s\n", hex.EncodeToString(hash.Sum(nil)), entry.Name())
	}
	return os.WriteFile(filepath.Join(dir, "SHA256SUMS"), []byte(sums.String()), 0o644)
}
