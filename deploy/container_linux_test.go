// Package deploy_test builds the image from the Dockerfile of this directory, in all its stages, and runs it as
// compose.yaml says. There is no registry to get the Go image from, nor a daemon: buildah builds, with what this machine
// has in /usr in place of that image, and runc runs, in a network namespace of its own, where the server has its port for
// itself.
package deploy_test

import (
	"bytes"
	"encoding/json"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/polykit/polykit-cache/internal/cachetest"
)

// maxImageSize is the most bytes that all files of the image may have.
const maxImageSize = 40_000_000

// skip skips a test where the system does not allow it. In CI it does, so there a skip is a failure.
func skip(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// command runs a command in a directory, "" for this one, and returns what it says on standard output.
func command(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = dir
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v\n%s%s", strings.Join(args, " "), err, &stdout, &stderr)
	}
	return strings.TrimSpace(stdout.String())
}

// image is one that was built, with its files in a directory.
type image struct {
	root   string
	config imageConfig
}

// imageConfig is what an image says of itself, as Docker has it.
type imageConfig struct {
	User         string
	Env          []string
	Entrypoint   []string
	Cmd          []string
	Labels       map[string]string
	Volumes      map[string]struct{}
	ExposedPorts map[string]struct{}
	Healthcheck  struct{ Test []string }
}

// build builds the image for this machine.
func build(t *testing.T) image {
	t.Helper()
	for _, program := range []string{"buildah", "runc"} {
		if _, err := exec.LookPath(program); err != nil {
			skip(t, "there is no %s, which this test needs", program)
		}
	}
	if os.Getuid() != 0 {
		skip(t, "only root can build and run an image here")
	}
	command(t, "..", "go", "list", "-deps", "./cmd/polykit-cache") // there is no network where it is built
	env := goEnv(t, "GOROOT", "GOMODCACHE", "GOCACHE", "GOARCH")

	storage := t.TempDir()
	buildah := func(args ...string) string {
		return command(t, "", append([]string{"buildah", "--root", storage + "/root", "--runroot", storage + "/run", "--storage-driver", "vfs"}, args...)...)
	}
	buildah("build", "--isolation", "chroot", "--tag", "go", goImage(t, env))
	args := []string{"build", "--isolation", "chroot", "--format", "docker", "--tag", "polykit-cache", "--platform", "linux/" + env["GOARCH"],
		"--build-arg", "GO_IMAGE=localhost/go", "--build-arg", "VERSION=v1.2.3-test", "--build-arg", "REVISION=abcdef", "--volume", "/usr:/usr:ro"}
	for _, dir := range []string{env["GOROOT"] + ":ro", env["GOMODCACHE"] + ":ro", env["GOCACHE"]} {
		path, _, _ := strings.Cut(dir, ":")
		args = append(args, "--volume", path+":"+dir)
	}
	buildah(append(args, "--file", "Dockerfile", "..")...)

	var inspected struct{ Docker struct{ Config imageConfig } }
	if err := json.Unmarshal([]byte(buildah("inspect", "--type", "image", "polykit-cache")), &inspected); err != nil {
		t.Fatal(err)
	}
	return image{buildah("mount", buildah("from", "polykit-cache")), inspected.Docker.Config}
}

func goEnv(t *testing.T, names ...string) map[string]string {
	t.Helper()
	var env map[string]string
	if err := json.Unmarshal([]byte(command(t, "", append([]string{"go", "env", "-json"}, names...)...)), &env); err != nil {
		t.Fatal(err)
	}
	return env
}

// goImage returns a directory with what makes an image of Go, if /usr and the directories of Go are mounted into it.
func goImage(t *testing.T, env map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"usr", "tmp", "root", "etc/ssl/certs"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"bin", "lib", "lib64"} {
		if err := os.Symlink("usr/"+name, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	file := "FROM scratch\nCOPY . /\nENV PATH=" + env["GOROOT"] + "/bin:/usr/bin GOTOOLCHAIN=local GOPROXY=off GOMODCACHE=" + env["GOMODCACHE"] + " GOCACHE=" + env["GOCACHE"] + "\n"
	for name, content := range map[string][]byte{"etc/ssl/certs/ca-certificates.crt": cachetest.NewAuthority("public").PEM(), "Dockerfile": []byte(file)} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestContainer(t *testing.T) {
	built := build(t)
	t.Run("image", func(t *testing.T) { checkImage(t, built) })
	t.Run("same binary in another directory", func(t *testing.T) { checkBinary(t, built) })
	t.Run("as compose.yaml says", func(t *testing.T) { checkComposed(t, built) })
	t.Run("TLS on another port", func(t *testing.T) { checkTLS(t, built) })
	t.Run("many uploads in 256 MiB", func(t *testing.T) { checkMemory(t, built, 256<<20, 1200, 50000) })
	t.Run("many uploads in 128 MiB", func(t *testing.T) { checkMemory(t, built, 128<<20, 600, 25000) })
}

func checkImage(t *testing.T, built image) {
	size := int64(0)
	files := []string{}
	err := filepath.WalkDir(built.root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		owner := ownerOf(info)
		name := strings.TrimPrefix(path, built.root)
		if !entry.IsDir() {
			size += info.Size()
			files = append(files, name)
		}
		if name == "/var/lib/polykit-cache" {
			if owner != [2]uint32{65532, 65532} {
				t.Errorf("%s belongs to %d, who can't store anything in it", name, owner)
			}
		} else if owner[0] != 0 || info.Mode().Perm()&0o022 != 0 {
			t.Errorf("%s can be changed by others than root: %d, %v", name, owner, info.Mode())
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the image has %d bytes", size)
	if size > maxImageSize {
		t.Errorf("the image has %d bytes, which are more than %d", size, maxImageSize)
	}
	if want := []string{"/etc/ssl/certs/ca-certificates.crt", "/usr/bin/polykit-cache"}; !slices.Equal(files, want) {
		t.Errorf("the image has the files %q, want %q", files, want)
	}

	config := built.config
	if config.User != "65532:65532" {
		t.Errorf("the user is %q", config.User)
	}
	if !slices.Equal(config.Entrypoint, []string{"/usr/bin/polykit-cache"}) || len(config.Cmd) > 0 {
		t.Errorf("it runs %q %q", config.Entrypoint, config.Cmd)
	}
	if !slices.Equal(config.Healthcheck.Test, []string{"CMD", "/usr/bin/polykit-cache", "healthcheck"}) {
		t.Errorf("the health check is %q", config.Healthcheck.Test)
	}
	if volumes := slices.Collect(maps.Keys(config.Volumes)); !slices.Equal(volumes, []string{"/var/lib/polykit-cache"}) {
		t.Errorf("the volumes are %q", volumes)
	}
	if ports := slices.Collect(maps.Keys(config.ExposedPorts)); !slices.Equal(ports, []string{"8080/tcp"}) {
		t.Errorf("the ports are %q", ports)
	}
	for label, want := range map[string]string{
		"title": "polykit-cache", "description": "Remote cache for build artifacts", "licenses": "Apache-2.0",
		"source": "https://github.com/polykit/polykit-cache", "version": "v1.2.3-test", "revision": "abcdef",
	} {
		if got := config.Labels["org.opencontainers.image."+label]; got != want {
			t.Errorf("the label %s is %q, want %q", label, got, want)
		}
	}
}

// checkBinary builds the binary once more, where the source has another path.
func checkBinary(t *testing.T, built image) {
	again := filepath.Join(t.TempDir(), "polykit-cache")
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=auto", "-ldflags", "-s -w -X main.stamp=v1.2.3-test", "-o", again, "./cmd/polykit-cache")
	cmd.Dir = ".."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	a, err := os.ReadFile(again)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(built.root, "usr/bin/polykit-cache"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) {
		t.Errorf("the binary is another one: %s here and %s in the image", command(t, "", again, "--version"), command(t, "", filepath.Join(built.root, "usr/bin/polykit-cache"), "--version"))
	}
	if version := command(t, "", again, "--version"); strings.Contains(version, "(devel)") {
		t.Errorf("it says that it is %s", version)
	}
}
