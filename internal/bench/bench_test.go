//go:build linux

package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == referenceArg { // started by a test as one
		main()
		return
	}
	os.Exit(m.Run())
}

// quick are the arguments for figures that say nothing, but need all that those which do say something need.
var quick = []string{"-rounds", "1", "-duration", "100ms", "-large", "3000000", "-huge", "5000000", "-idle", "50", "-artifacts", "300"}

// TestTable measures every row, and makes sure that each figure of it is there. It takes the whole machine,
// which tests beside it that measure memory or time would not bear, so CI runs it by itself.
func TestTable(t *testing.T) {
	if os.Getenv("POLYKIT_CACHE_TEST_BENCH") == "" {
		t.Skip("POLYKIT_CACHE_TEST_BENCH is not set: no row is measured")
	}
	if _, err := exec.LookPath("nginx"); err != nil {
		if _, err := os.Stat("/usr/sbin/nginx"); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatal("nginx is not installed, and in CI it is not optional")
			}
			t.Skip("nginx is not installed: nothing is measured beside it")
		}
	}
	var table, progress bytes.Buffer
	if err := run(t.Context(), append(quick, "-dir", t.TempDir()), &table, &progress); err != nil {
		t.Fatal(err)
	}
	got := table.String()
	const number = `\d[\d,.]*`
	for _, want := range []string{
		`\d{4}-\d\d-\d\d, go.*, linux/.*, \d+ processors, 1 rounds of 100ms`,
		`GET 2\.9 MiB, 4 connections +\| speed +\| N GB/s +\| N GB/s, nginx +\| N +\| ≥ 0\.95`,
		`\| +\| CPU per GB +\| N s +\| N s, nginx +\| (N|NaN|\+Inf) +\| ≤ 1\.15`,
		`GET 4 KiB, 16 connections +\| speed +\| N/s +\| N/s, nginx +\| N +\| ≥ 0\.45`,
		`GET 4 KiB with a token, 16 connections +\| speed +\| N/s +\| N/s, no auth file +\| N +\| `,
		`HEAD, 16 connections +\| speed +\| N/s +\| N/s, nginx +\| N +\| ≥ 0\.45`,
		`GET of a missing key, 16 connections +\| speed +\| N/s +\| N/s, nginx +\| N +\| ≥ 0\.45`,
		`PUT 2\.9 MiB, incompressible, 1 connection +\| speed +\| N GB/s +\| N GB/s, floor of verification +\| N +\| ≥ 1\.00`,
		`\| +\| CPU per GB +\| N s +\| N s, that floor and the write +\| N +\| ≤ 1\.25`,
		`PUT 2\.9 MiB, compressible, 1 connection +\| speed +\| N GB/s`,
		`PUT 2 KiB, 16 connections +\| speed +\| N/s +\| N/s, create, write, fsync, link +\| N +\| ≥ 0\.70`,
		`GetArtifact 2\.9 MiB, 4 streams +\| speed +\| N GB/s +\| N GB/s, bare grpc-go +\| N +\| `,
		`GetArtifact 4 KiB, 16 streams +\| speed +\| N/s +\| N/s, bare grpc-go +\| N +\| `,
		`PutArtifact 2\.9 MiB, 1 stream +\| speed +\| N GB/s +\| N GB/s, REST +\| N +\| `,
		`8 clients put and get 4\.8 MiB each over REST +\| peak resident +\| N MiB +\| +\| +\| ≤ 256 MiB`,
		`8 clients put and get 4\.8 MiB each over gRPC +\| peak resident +\| N MiB +\| +\| +\| ≤ 256 MiB`,
		`nothing +\| resident +\| N MiB +\| +\| +\| ≤ 32 MiB`,
		`50 idle connections, after a GET of 4 KiB on each +\| resident +\| N MiB`,
		`300 artifacts of 1 KiB stored +\| start until it listens, slowest +\| N s +\| +\| +\| ≤ 1 s`,
		`GET p50 of 300 of them +\| N.?s +\| N.?s, empty store +\| N +\| ≤ 1\.20`,
		`resident after that +\| N MiB +\| +\| +\| ≤ 100 MiB`,
		`the same, after a kill +\| until everything is in the index +\| N s +\| +\| +\| ≤ 300 s`,
		`GET p99 meanwhile, at N/s +\| N.?s +\| N.?s, afterwards +\| N +\| ≤ 1\.25`,
		`the same, after a kill and without the index +\| until everything is in the index`,
	} {
		if !regexp.MustCompile(strings.ReplaceAll(want, "N", number)).MatchString(got) {
			t.Errorf("the table has no %s", want)
		}
	}
	if t.Failed() {
		t.Log("\n" + got)
	}
}

// TestMarks makes sure that a figure that misses its mark is not said to have reached it.
func TestMarks(t *testing.T) {
	if l := least(0.45, 0.449); l.reached {
		t.Error("0.449 is not 0.45 at least")
	}
	if l := least(0.45, 0.45); !l.reached {
		t.Error("0.45 is 0.45 at least")
	}
	if l := most(1.1, 1.101); l.reached {
		t.Error("1.101 is not 1.1 at most")
	}
	if l := bounded(100, 101, mib); l.reached {
		t.Error("101 is not 100 at most")
	}
	var text bytes.Buffer
	if err := (table{least(0.5, 0.4).of("w", "f", "s", "r"), most(2, 1).of("w", "g", "s", "r")}).print(&text); err != nil {
		t.Fatal(err)
	}
	if got := text.String(); strings.Count(got, "**missed**") != 1 || strings.Count(got, "reached") != 1 || strings.Count(got, "| w ") != 1 {
		t.Errorf("printed:\n%s", got)
	}
}

// TestRatio takes the median of the ratios of each round, and not the ratio of two medians.
func TestRatio(t *testing.T) {
	l := []turn{{speed: 1, cpu: 2}, {speed: 3, cpu: 1}, {speed: 2, cpu: 9}}
	reference := []turn{{speed: 2, cpu: 1}, {speed: 2, cpu: 1}, {speed: 2, cpu: 3}}
	if got := fmt.Sprint(median(l, speedOf), ratio(l, reference, speedOf), ratio(l, reference, cpuOf)); got != "2 1 2" {
		t.Errorf("got %s", got)
	}
}

func TestBadArguments(t *testing.T) {
	for want, args := range map[string][]string{
		`no row has a name with one of ["nothing"] in it`: {"nothing"},
		"flag provided but not defined: -x":               {"-x"},
		"-rounds is 0; it must be more than 0":            {"-rounds", "0"},
	} {
		if err := run(t.Context(), args, new(bytes.Buffer), new(bytes.Buffer)); err == nil || err.Error() != want {
			t.Errorf("%q: got %v, want %s", args, err, want)
		}
	}
}
