package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/spf13/cobra"

	"github.com/polykit/polykit-cache/internal/client"
)

// startServerWithMany starts a server on a directory with n artifacts that somebody else put there, waits
// until its index knows them, and returns how to run a command that says nothing but its answer.
func startServerWithMany(t *testing.T, n int, grpc bool) (command func(args ...string) (stdout string)) {
	t.Helper()
	dir := t.TempDir()
	shard := filepath.Join(dir, "ab", "cd")
	if err := os.MkdirAll(shard, 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		if err := os.WriteFile(filepath.Join(shard, fmt.Sprintf("abcd%028d.zst", i)), []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	complete := &awaited{text: "the index is complete", seen: make(chan struct{})}
	address := startServerIn(t, dir, complete)
	<-complete.seen
	return func(args ...string) string {
		t.Helper()
		status, stdout, stderr := polykit(t, append(args, "--server=http://"+address, fmt.Sprint("--grpc=", grpc))...)
		if status != 0 || stderr != "" {
			t.Fatalf("%s: exit status %d, %q", args, status, stderr)
		}
		return stdout
	}
}

// awaited tells when a text is written to it.
type awaited struct {
	text string
	seen chan struct{}
	once sync.Once
}

func (a *awaited) Write(line []byte) (int, error) {
	if strings.Contains(string(line), a.text) {
		a.once.Do(func() { close(a.seen) })
	}
	return len(line), nil
}

// What takes more than a page is listed as a whole.
func TestListOfMany(t *testing.T) {
	eachProtocol(t, func(t *testing.T, grpc bool) {
		const n = 1_050
		command := startServerWithMany(t, n, grpc)
		for _, limit := range []string{"0", "1050", "1051"} {
			rows := strings.Split(command("list", "--limit="+limit, "--sort=key"), "\n")
			if len(rows) != 1+n+1 { // with what is behind the last line
				t.Fatalf("%d rows are listed with --limit %s", len(rows)-2, limit)
			}
			for i, row := range rows[1 : 1+n] {
				if want := fmt.Sprintf("abcd%028d  -  ", i); !strings.HasPrefix(row, want) {
					t.Fatalf("row %d is %q, want it to begin with %q", i, row, want)
				}
			}
		}
		if lines := strings.Count(command("list", "--limit=0", "--json"), "\n"); lines != n {
			t.Errorf("%d lines are listed", lines)
		}
	})
}

// inParts is a server of which the first call deletes only the keys that begin with a prefix, and says that there
// are more.
type inParts struct {
	remote
	prefix string
	calls  int
	broken error // of the second call, or nil
}

func (p *inParts) DeleteMatching(ctx context.Context, request *client.DeleteRequest) (*client.Deleted, error) {
	if request.GetDryRun() {
		return p.remote.DeleteMatching(ctx, request)
	}
	switch p.calls++; {
	case p.calls == 1:
		deleted, err := p.remote.DeleteMatching(ctx, &client.DeleteRequest{Filter: &client.Filter{KeyPrefix: p.prefix}})
		deleted.More = true
		return deleted, err
	case p.calls == 2 && p.broken != nil:
		return nil, p.broken
	}
	return p.remote.DeleteMatching(ctx, request)
}

// What takes several calls is deleted as a whole, and summed up. If a call fails, it is said what is deleted.
func TestDeleteTakesSeveralCalls(t *testing.T) {
	eachProtocol(t, func(t *testing.T, grpc bool) {
		broken := errors.New("the connection broke")
		for _, test := range []struct {
			name           string
			broken         error
			deleted, calls int
		}{
			{"in good order", nil, 5, 2},
			{"broken", broken, 3, 2},
			{"interrupted", context.Canceled, 3, 2},
		} {
			address := startServer(t)
			for _, key := range []string{"a1", "a2", "a3", "b1", "b2"} {
				status, _, stderr := polykit(t, "put", key+testKey, "testdata", "--package=web", "--task=build", "--server=http://"+address)
				if status != 0 {
					t.Fatalf("put: exit status %d, %s", status, stderr)
				}
			}
			flags := &deleteFlags{remoteFlags: remoteFlags{server: "http://" + address, grpc: grpc}, all: true, yes: true}
			server, err := flags.connect(io.Discard)
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
			parts := &inParts{remote: server, prefix: "a", broken: test.broken}
			var stdout, stderr strings.Builder
			cmd := &cobra.Command{}
			cmd.SetContext(t.Context())
			cmd.SetOut(&stdout)
			cmd.SetErr(&stderr)
			err = flags.deleteMatching(cmd, parts, &client.Filter{})
			switch {
			case test.broken == context.Canceled:
				if err == nil || err.Error() != "interrupted; more may be deleted than was printed" {
					t.Errorf("%s: error %v", test.name, err)
				}
			case !errors.Is(err, test.broken):
				t.Errorf("%s: error %v, want %v", test.name, err, test.broken)
			}
			row := regexp.MustCompile(fmt.Sprintf(`\nweb +build +%d +[0-9.]+ KiB +deleted\ntotal +%[1]d +[0-9.]+ KiB\n$`, test.deleted))
			if !row.MatchString(stdout.String()) || stderr.Len() > 0 || parts.calls != test.calls {
				t.Errorf("%s: %d calls, printed %s%s", test.name, parts.calls, &stdout, &stderr)
			}
		}
	})
}

// Who is asked may interrupt instead.
func TestDeleteIsInterruptedWhileItAsks(t *testing.T) {
	t.Parallel()
	stdin, silent := io.Pipe()
	defer silent.Close()
	stderr, stderrTo := io.Pipe()
	ctx, interrupt := context.WithCancel(t.Context())
	go func() {
		bufio.NewReader(stderr).ReadString('?')
		interrupt()
		io.Copy(io.Discard, stderr)
	}()
	cmd := &cobra.Command{RunE: func(cmd *cobra.Command, _ []string) error {
		return confirm(cmd, removals{{}: &client.Removal{ArtifactCount: 1}})
	}}
	cmd.SetIn(stdin)
	cmd.SetErr(stderrTo)
	cmd.SetArgs(nil)
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	if err := cmd.ExecuteContext(ctx); err == nil || err.Error() != "interrupted; nothing was deleted" {
		t.Errorf("error %v", err)
	}
	stderrTo.Close()
}

// Keys may come slowly, and then an interruption must not wait for them.
func TestMissingIsInterruptedWhileItReads(t *testing.T) {
	t.Parallel()
	stdin, silent := io.Pipe()
	defer silent.Close()
	ctx, interrupt := context.WithCancel(t.Context())
	go func() {
		silent.Write([]byte(testKey)) // returns when it was read
		interrupt()
	}()
	cmd := missingCommand()
	cmd.SetIn(stdin)
	cmd.SetArgs([]string{"--server=http://127.0.0.1:1"})
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	if err := cmd.ExecuteContext(ctx); err == nil || err.Error() != "interrupted" {
		t.Errorf("error %v", err)
	}
}

// What several calls delete is summed up.
func TestRemovals(t *testing.T) {
	t.Parallel()
	r := removals{}
	small := &client.Removal{PackageName: "api", TaskName: "build", Reason: 1, ArtifactCount: 1, DiskSize: 1024}
	large := &client.Removal{PackageName: "web", TaskName: "build", Reason: 1, ArtifactCount: 999, DiskSize: 1 << 20}
	aged := &client.Removal{PackageName: "web", TaskName: "build", Reason: 2, ArtifactCount: 1, DiskSize: 1}
	if freed := r.add([]*client.Removal{small, large}); freed != 1<<20+1024 {
		t.Errorf("frees %d bytes", freed)
	}
	r.add([]*client.Removal{large, aged, {Reason: 1}})
	var got strings.Builder
	if err := r.print(&got); err != nil {
		t.Fatal(err)
	}
	want := `PACKAGE  TASK   ARTIFACTS  ON DISK  REASON
web      build  1,998      2.0 MiB  deleted
api      build  1          1.0 KiB  deleted
web      build  1          1 B      max-age
-        -      0          0 B      deleted
total           2,000      2.0 MiB
`
	if got.String() != want {
		t.Errorf("printed\n%s\nwant\n%s", &got, want)
	}
}

func TestFormatBar(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		part, whole int64
		want        string
	}{
		{0, 0, "[--------------------] 0%"},
		{1, 20, "[#-------------------] 5%"},
		{1 << 61, 1 << 62, "[##########----------] 50%"},
		{20, 20, "[####################] 100%"},
		{30, 20, "[####################] 100%"},
		{-1, 20, "[--------------------] 0%"},
	} {
		if got := formatBar(test.part, test.whole); got != test.want {
			t.Errorf("%d of %d: %s, want %s", test.part, test.whole, got, test.want)
		}
	}
}
