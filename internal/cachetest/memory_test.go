package cachetest_test

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

func TestMemory(t *testing.T) {
	open := func(t *testing.T) cache.Store {
		m := new(cachetest.Memory)
		t.Cleanup(func() {
			if uploads, files := m.InUse(); uploads != 0 || files != 0 {
				t.Errorf("%d uploads and %d files are in use in the end", uploads, files)
			}
		})
		return m
	}
	t.Run("the default scope", func(t *testing.T) { cachetest.TestStore(t, open) })
	t.Run("another scope", func(t *testing.T) {
		cachetest.TestStore(t, func(t *testing.T) cache.Store { return open(t).In(cachetest.Scope("pr-7")) })
	})
}

func TestMemoryFaults(t *testing.T) {
	var (
		ctx     = t.Context()
		key     = cachetest.Key("a")
		content = []byte("0123456789")
		info    = artifact.Info{Key: key, Size: 10}
		fault   = errors.New("fault")
		m       = new(cachetest.Memory)
	)
	want := func(what string, err, want error) {
		t.Helper()
		if err != want {
			t.Errorf("%s returned %v, want %v", what, err, want)
		}
	}

	m.Fail(cachetest.Faults{Create: fault})
	_, err := m.Create(ctx, key, 10)
	want("Create", err, fault)

	m.Fail(cachetest.Faults{Write: fault, WriteAfter: 6})
	upload, err := m.Create(ctx, key, 10)
	want("Create", err, nil)
	for _, step := range []struct {
		length, n int
		err       error
	}{{4, 4, nil}, {4, 2, fault}, {1, 0, fault}} {
		if n, err := upload.Write(content[:step.length]); n != step.n || err != step.err {
			t.Errorf("Write of %d bytes returned %d, %v, want %d, %v", step.length, n, err, step.n, step.err)
		}
	}
	upload.Abort()

	m.Fail(cachetest.Faults{Commit: fault})
	upload, err = m.Create(ctx, key, 10)
	want("Create", err, nil)
	_, err = upload.Write(content)
	want("Write", err, nil)
	_, err = upload.Commit(ctx, info)
	want("Commit", err, fault)
	_, err = m.Stat(ctx, key)
	want("Stat", err, cache.ErrNotFound)
	if uploads, _ := m.InUse(); uploads != 1 {
		t.Errorf("%d uploads are in use, want 1", uploads)
	}

	m.Fail(cachetest.Faults{Commit: fault, CommitHappens: true})
	_, err = upload.Commit(ctx, info)
	want("Commit", err, fault)
	upload.Abort()
	_, err = m.Stat(ctx, key)
	want("Stat", err, nil)

	m.Fail(cachetest.Faults{Open: fault, Stat: fault, Quarantine: fault, Check: fault})
	_, _, err = m.Open(ctx, key)
	want("Open", err, fault)
	_, err = m.Stat(ctx, key)
	want("Stat", err, fault)
	want("Quarantine", m.Quarantine(ctx, info, fault), fault)
	want("Check", m.Check(ctx), fault)

	m.Fail(cachetest.Faults{Read: fault, ReadAfter: 7})
	file, _, err := m.Open(ctx, key)
	want("Open", err, nil)
	var got bytes.Buffer
	_, err = io.Copy(&got, file)
	want("Copy", err, fault)
	if got.String() != "0123456" {
		t.Errorf("read %q before the fault", &got)
	}
	_, err = file.Seek(3, io.SeekStart)
	want("Seek", err, nil)
	if part, err := io.ReadAll(file); string(part) != "3456" || err != fault {
		t.Errorf("read %q, %v after Seek", part, err)
	}
	m.Fail(cachetest.Faults{Read: io.EOF, ReadAfter: 9})
	if part, err := io.ReadAll(file); string(part) != "78" || err != nil {
		t.Errorf("read %q, %v of a file that is too short", part, err)
	}

	m.Fail(cachetest.Faults{})
	m.Damage(key, []byte("other"))
	if rest, err := io.ReadAll(file); string(rest) != "9" || err != nil {
		t.Errorf("read %q, %v of a file that was open", rest, err)
	}
	want("Close", file.Close(), nil)
	damaged, known, err := m.Open(ctx, key)
	want("Open", err, nil)
	defer damaged.Close()
	if got, err := io.ReadAll(damaged); string(got) != "other" || known.Size != 10 || err != nil {
		t.Errorf("read %q, %v of a damaged artifact of size %d", got, err, known.Size)
	}
}
