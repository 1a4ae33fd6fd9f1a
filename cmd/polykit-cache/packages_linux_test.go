package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestPackages builds the Debian package and the rpm, and looks into them. The program of the former runs.
func TestPackages(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"make", "dpkg-deb", "rpm"} {
		output(t, name, "--version") // or it is skipped before anything is built
	}
	dist := filepath.Join(t.TempDir(), "dist") // which is not there yet, as after a checkout
	output(t, "make", "-C", "../..", "packages", "DIST="+dist, "STAGE="+filepath.Join(t.TempDir(), "stage"))
	one := func(pattern string) string {
		t.Helper()
		found, err := filepath.Glob(filepath.Join(dist, pattern))
		if len(found) != 1 || err != nil {
			t.Fatalf("%s: %v, %v", pattern, found, err)
		}
		return found[0]
	}
	deb, rpm := one("*.deb"), one("*.rpm")
	files := []string{
		"/etc/default/polykit-cache",
		"/etc/polykit-cache",
		"/usr/bin/polykit-cache",
		"/usr/lib/systemd/system/polykit-cache.service",
		"/usr/lib/systemd/system/polykit-cache.socket",
		"/usr/lib/sysusers.d/polykit-cache.conf",
		"/usr/share/bash-completion/completions/polykit-cache",
		"/usr/share/doc/polykit-cache/copyright",
		"/usr/share/doc/polykit-cache/examples/auth.yaml",
	}
	contents, listed := output(t, "dpkg-deb", "--contents", deb), output(t, "rpm", "-qpl", rpm)
	for _, file := range files {
		if !regexp.MustCompile(`root/root .* \.` + file + `/?\n`).MatchString(contents) {
			t.Errorf("%s is not in the Debian package:\n%s", file, contents)
		}
		if !strings.Contains(listed, file+"\n") {
			t.Errorf("%s is not in the rpm:\n%s", file, listed)
		}
	}
	version := strings.TrimSpace(output(t, "dpkg-deb", "--field", deb, "Version"))
	if !regexp.MustCompile(`^[0-9]+\.[0-9]+\.[0-9]+([-+~].*)?$`).MatchString(version) {
		t.Errorf("the version of the Debian package is %q", version)
	}
	if other := output(t, "rpm", "-qp", "--queryformat=%{VERSION}", rpm); other != version {
		t.Errorf("the version of the rpm is %q, that of the Debian package %q", other, version)
	}
	if config := output(t, "rpm", "-qp", "--configfiles", rpm); config != "/etc/default/polykit-cache\n" {
		t.Errorf("the configuration files of the rpm are %q", config)
	}

	root := filepath.Join(dist, "root")
	output(t, "dpkg-deb", "-x", deb, root)
	if said := output(t, filepath.Join(root, "usr/bin/polykit-cache"), "--version"); !strings.HasPrefix(said, "polykit-cache ") {
		t.Errorf("--version says %q", said)
	}
	output(t, "bash", "-n", filepath.Join(root, "usr/share/bash-completion/completions/polykit-cache"))

	control := filepath.Join(dist, "control")
	output(t, "dpkg-deb", "--control", deb, control)
	if conffiles, err := os.ReadFile(filepath.Join(control, "conffiles")); err != nil || string(conffiles) != "/etc/default/polykit-cache\n" {
		t.Errorf("the conffiles of the Debian package are %q, %v", conffiles, err)
	}
	scripts := output(t, "rpm", "-qp", "--scripts", rpm)
	for _, name := range []string{"postinst", "prerm", "postrm"} {
		script, err := os.ReadFile(filepath.Join(control, name))
		check(t, err)
		output(t, "sh", "-n", filepath.Join(control, name))
		if !strings.Contains(scripts, strings.TrimSpace(string(script))) {
			t.Errorf("the rpm has no %s:\n%s", name, scripts)
		}
	}
	// The settings in the example, which are comments, must be what the server knows.
	settings, err := os.ReadFile(filepath.Join(root, "etc/default/polykit-cache"))
	check(t, err)
	_, help, _ := polykit(t, "--help")
	for _, setting := range regexp.MustCompile(`(?m)^#(POLYKIT_CACHE_[A-Z_]+)=`).FindAllStringSubmatch(string(settings), -1) {
		if !strings.Contains(help, "[$"+setting[1]+"]") {
			t.Errorf("/etc/default/polykit-cache has %s, which is no variable of a flag", setting[1])
		}
	}
}
