// Package cachetest is what the tests of several packages need: sound and unsound artifacts, the
// contract of cache.Store as a suite, and a store in memory that fails as it is told to.
package cachetest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cache"
)

// TestStore holds a store to what package cache promises of every cache.Store. open returns a store
// that is empty in all scopes and that nobody else uses; what it needs in the end it registers with t.Cleanup.
func TestStore(t *testing.T, open func(t *testing.T) cache.Store) {
	for _, test := range []struct {
		name string
		run  func(*storeTest)
	}{
		{"what was committed is served", (*storeTest).roundTrip},
		{"what is known of an artifact is kept exactly", (*storeTest).exactInfo},
		{"what was not stored is a miss", (*storeTest).misses},
		{"an upload is invisible before its commit", (*storeTest).invisible},
		{"an aborted upload leaves no trace", (*storeTest).abort},
		{"an abort after the commit changes nothing", (*storeTest).abortAfterCommit},
		{"of two uploads the first to commit wins", (*storeTest).secondCommit},
		{"what exists can't be created", (*storeTest).exists},
		{"keys that resemble each other are different", (*storeTest).neighbours},
		{"an open file outlives its artifact", (*storeTest).openFile},
		{"quarantine frees the key", (*storeTest).quarantine},
		{"quarantine spares what it does not mean", (*storeTest).quarantineOther},
		{"what was removed is a miss", (*storeTest).remove},
		{"a pin changes nothing that is served", (*storeTest).pin},
		{"of many commits of one key exactly one wins", (*storeTest).race},
		{"many keys at once", (*storeTest).manyKeys},
		{"a commit is seen as a whole", (*storeTest).seenAsAWhole},
		{"quarantines that race with an upload spare it", (*storeTest).quarantineRace},
		{"scopes are apart", (*storeTest).scopes},
		{"what was promoted is in both scopes", (*storeTest).promote},
		{"of promotions and commits of one key exactly one wins", (*storeTest).promoteRace},
		{"a scope that is emptied can be written to", (*storeTest).emptied},
		{"a healthy store is ready", (*storeTest).healthy},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.run(&storeTest{T: t, ctx: t.Context(), store: open(t)})
		})
	}
}

var errDamaged = errors.New("damaged, for this test")

func (t *storeTest) roundTrip() {
	a := sampleOf(Key("a"), "content of a")
	info := t.put(a)
	if info.StoredAt.IsZero() {
		t.Error("Commit left StoredAt zero")
	}
	t.serves(a, info)

	b := sampleOf(Key("b"), "content of b, whose upload does not declare its size and comes byte by byte")
	upload := t.create(b.info.Key, cache.UnknownSize)
	for i := range b.content {
		t.write(upload, b.content[i:i+1])
	}
	t.serves(b, t.commit(upload, b))
	t.serves(a, info)

	file, _, err := t.store.Open(t.ctx, b.info.Key)
	t.noError("Open", err)
	defer file.Close()
	for _, seek := range []struct {
		offset int64
		whence int
		want   []byte
	}{
		{-5, io.SeekEnd, b.content[len(b.content)-5:]},
		{7, io.SeekStart, b.content[7:]},
		{0, io.SeekEnd, nil},
		{-2, io.SeekCurrent, b.content[len(b.content)-2:]},
	} {
		_, err := file.Seek(seek.offset, seek.whence)
		t.noError("Seek", err)
		got, err := io.ReadAll(file)
		if err != nil || !bytes.Equal(got, seek.want) {
			t.Errorf("read %d bytes, %v after Seek(%d, %d), want the last %d", len(got), err, seek.offset, seek.whence, len(seek.want))
		}
	}
}

func (t *storeTest) exactInfo() {
	for name, metadata := range map[string]artifact.Metadata{
		"empty":    {CreatedAt: time.Unix(0, 0).UTC()},
		"escaped":  {PackageName: `"\/<&>`, TaskName: "\x00\x1f\x7f\u2028", Command: "a\nb\r\tc", CreatedAt: time.Unix(1, 0).UTC()},
		"unicode":  {PackageName: "пакет", TaskName: "构建", Command: "echo 🚀 \uFFFD", CreatedAt: time.Unix(1700000000, 0).UTC()},
		"far away": {PackageName: "p", TaskName: "t", Command: strings.Repeat("<", 64<<10), CreatedAt: time.Unix(253402300799, 0).UTC()},
	} {
		a := sampleOf(Key(name), name)
		a.info.Metadata = metadata
		a.info.UncompressedSize = 1<<63 - 1
		a.info.FileCount = 1 << 30
		info := t.put(a)
		if info.Metadata != metadata {
			t.Errorf("%s: Commit returned the metadata %+v, want %+v", name, info.Metadata, metadata)
		}
		t.serves(a, info)
	}
}

func (t *storeTest) misses() {
	t.lacks(Key("never stored"))
	t.put(sampleOf(Key("other"), "content"))
	t.lacks(Key("never stored"))
	t.noError("Quarantine of nothing", t.store.Quarantine(t.ctx, sampleOf(Key("never stored"), "").info, errDamaged))
	t.lacks(Key("never stored"))
}

func (t *storeTest) invisible() {
	a := sampleOf(Key("a"), "content of a")
	upload := t.create(a.info.Key, a.info.Size)
	t.lacks(a.info.Key)
	t.write(upload, a.content[:10])
	t.lacks(a.info.Key)
	t.write(upload, a.content[10:])
	t.lacks(a.info.Key)
	t.serves(a, t.commit(upload, a))
}

func (t *storeTest) abort() {
	a := sampleOf(Key("a"), "content of a")
	for _, written := range []int{0, 1, len(a.content)} {
		upload := t.create(a.info.Key, a.info.Size)
		t.write(upload, a.content[:written])
		upload.Abort()
		t.lacks(a.info.Key)
		upload.Abort()
		if _, err := upload.Commit(t.ctx, a.info); err == nil {
			t.Error("Commit worked after Abort")
		}
		if _, err := upload.Write(a.content); err == nil {
			t.Error("Write worked after Abort")
		}
		upload.Abort()
		t.lacks(a.info.Key)
	}
	info := t.put(a)

	late := sampleOf(Key("late"), "content of late")
	aborted, other := t.create(late.info.Key, late.info.Size), t.create(late.info.Key, late.info.Size)
	t.write(aborted, late.content)
	t.write(other, late.content)
	aborted.Abort() // and not the other upload of the key
	t.serves(late, t.commit(other, late))
	t.serves(a, info)
}

func (t *storeTest) abortAfterCommit() {
	a := sampleOf(Key("a"), "content of a")
	upload := t.create(a.info.Key, a.info.Size)
	t.write(upload, a.content)
	info := t.commit(upload, a)
	for range 3 {
		upload.Abort()
		t.serves(a, info)
	}
}

func (t *storeTest) secondCommit() {
	first, second := sampleOf(Key("a"), "content 1"), sampleOf(Key("a"), "content 2")
	winner, loser := t.create(Key("a"), first.info.Size), t.create(Key("a"), second.info.Size)
	t.write(loser, second.content)
	t.write(winner, first.content)
	info := t.commit(winner, first)
	if _, err := loser.Commit(t.ctx, second.info); !errors.Is(err, cache.ErrExists) {
		t.Errorf("the second Commit returned %v, want %v", err, cache.ErrExists)
	}
	t.serves(first, info)
	loser.Abort()
	winner.Abort()
	t.serves(first, info)
}

func (t *storeTest) exists() {
	a := sampleOf(Key("a"), "content of a")
	info := t.put(a)
	for _, size := range []int64{a.info.Size, a.info.Size + 1, cache.UnknownSize} {
		upload, err := t.store.Create(t.ctx, a.info.Key, size)
		if !errors.Is(err, cache.ErrExists) {
			t.Errorf("Create returned %v, want %v", err, cache.ErrExists)
		}
		if err == nil {
			upload.Abort()
		}
	}
	t.serves(a, info)
}

func (t *storeTest) neighbours() {
	samples := []sample{}
	for _, digits := range []string{
		"abcd" + strings.Repeat("0", 28),
		"abcd" + strings.Repeat("0", 29), // one digit more
		"abcd" + strings.Repeat("0", 124),
		"abcd" + strings.Repeat("0", 27) + "1",
		"abce" + strings.Repeat("0", 28),
		"acbd" + strings.Repeat("0", 28),
		"0abcd" + strings.Repeat("0", 27),
		strings.Repeat("f", 128),
	} {
		key, err := artifact.ParseKey(digits)
		t.noError("ParseKey", err)
		t.lacks(key)
		samples = append(samples, sampleOf(key, digits))
	}
	infos := []artifact.Info{}
	for _, a := range samples {
		infos = append(infos, t.put(a))
	}
	for i, a := range samples {
		t.serves(a, infos[i])
	}
	t.noError("Quarantine", t.store.Quarantine(t.ctx, infos[0], errDamaged))
	t.lacks(samples[0].info.Key)
	for i, a := range samples[1:] {
		t.serves(a, infos[i+1])
	}
}

func (t *storeTest) openFile() {
	first, second := sampleOf(Key("a"), strings.Repeat("first  ", 100_000)), sampleOf(Key("a"), strings.Repeat("second ", 100_000))
	info := t.put(first)
	file, _, err := t.store.Open(t.ctx, Key("a"))
	t.noError("Open", err)
	defer file.Close()
	got := make([]byte, 1000, len(first.content))
	_, err = io.ReadFull(file, got)
	t.noError("Read", err)

	t.noError("Quarantine", t.store.Quarantine(t.ctx, info, errDamaged))
	t.serves(second, t.put(second))

	rest, err := io.ReadAll(file)
	if err != nil || !bytes.Equal(append(got, rest...), first.content) {
		t.Errorf("a file that was open while its artifact was replaced did not stay the same: %v", err)
	}
	_, err = file.Seek(0, io.SeekStart)
	t.noError("Seek", err)
	if again, err := io.ReadAll(file); err != nil || !bytes.Equal(again, first.content) {
		t.Errorf("… nor the second time: %v", err)
	}
}

func (t *storeTest) quarantine() {
	a := sampleOf(Key("a"), "content 1")
	for i := range 3 {
		info := t.put(a)
		t.serves(a, info)
		t.noError("Quarantine", t.store.Quarantine(t.ctx, info, errDamaged))
		t.lacks(Key("a"))
		t.noError("Quarantine again", t.store.Quarantine(t.ctx, info, errDamaged))
		t.lacks(Key("a"))
		a = sampleOf(Key("a"), fmt.Sprint("content ", i+2))
	}
	t.serves(a, t.put(a))
}

// quarantineOther uploads two artifacts at once, so that a store can't tell them apart by their size
// and a coarse clock.
func (t *storeTest) quarantineOther() {
	for round := range 20 {
		key := Key(fmt.Sprint(round))
		first, second := sampleOf(key, "content 1"), sampleOf(key, "content 2")
		if first.info.Size != second.info.Size {
			t.Fatal("the test is wrong: the samples must be of one size")
		}
		a, b := t.create(key, first.info.Size), t.create(key, second.info.Size)
		t.write(a, first.content)
		t.write(b, second.content)
		old := t.commit(a, first)
		t.noError("Quarantine", t.store.Quarantine(t.ctx, old, errDamaged))
		info := t.commit(b, second)
		t.serves(second, info)
		t.noError("Quarantine of what was replaced", t.store.Quarantine(t.ctx, old, errDamaged))
		t.serves(second, info)
	}
}

func (t *storeTest) remove() {
	other := sampleOf(Key("other"), "content")
	info := t.put(other)
	a := sampleOf(Key("a"), "content 1")
	for i := range 3 {
		t.serves(a, t.put(a))
		file, _, err := t.store.Open(t.ctx, a.info.Key)
		t.noError("Open", err)
		_, err = t.store.Remove(t.ctx, Key("a"))
		t.noError("Remove", err)
		t.lacks(Key("a"))
		if got, err := io.ReadAll(file); err != nil || !bytes.Equal(got, a.content) {
			t.Errorf("a file that was open when its artifact was removed has %q, %v", got, err)
		}
		t.noError("Close", file.Close())
		if _, err := t.store.Remove(t.ctx, Key("a")); !errors.Is(err, cache.ErrNotFound) {
			t.Errorf("Remove of what was removed returned %v, want %v", err, cache.ErrNotFound)
		}
		a = sampleOf(Key("a"), fmt.Sprint("content ", i+2))
	}
	t.serves(other, info)
}

func (t *storeTest) pin() {
	if err := t.store.Pin(t.ctx, Key("a"), true); !errors.Is(err, cache.ErrNotFound) {
		t.Errorf("Pin of a miss returned %v, want %v", err, cache.ErrNotFound)
	}
	a := sampleOf(Key("a"), "content of a")
	info := t.put(a)
	for _, pinned := range []bool{true, true, false, false} {
		t.noError("Pin", t.store.Pin(t.ctx, Key("a"), pinned))
		t.serves(a, info)
	}
}

func (t *storeTest) healthy() {
	t.noError("Check", t.store.Check(t.ctx))
	a := sampleOf(Key("a"), "content of a")
	upload := t.create(a.info.Key, a.info.Size)
	t.write(upload, a.content)
	t.noError("Check", t.store.Check(t.ctx))
	info := t.commit(upload, a)
	t.noError("Check", t.store.Check(t.ctx))
	t.serves(a, info)
}

// storeTest is one test of a store, and the words that its script is written in.
type storeTest struct {
	*testing.T
	ctx   context.Context
	store cache.Store
}

// sample is a sound artifact and what is known of it.
type sample struct {
	content []byte
	info    artifact.Info
}

// sampleOf returns an artifact with one file. Samples of the same length of text have the same size:
// nothing but the bytes tells them apart.
func sampleOf(key artifact.Key, text string) sample {
	manifest := Manifest(map[string]string{"stdout.txt": digest(text)}, len(text))
	content := Store(Tar(Metadata(key), manifest, File("outputs/stdout.txt", text)))
	return sample{content, artifact.Info{
		Key:              key,
		Hash:             sha256.Sum256(content),
		Size:             int64(len(content)),
		Manifest:         ManifestDigest(map[string]string{"stdout.txt": text}),
		UncompressedSize: int64(len(text)),
		FileCount:        1,
		Metadata: artifact.Metadata{
			PackageName: "web",
			TaskName:    "build",
			Command:     "npm run build",
			CreatedAt:   time.Unix(1700000000, 0).UTC(),
		},
	}}
}

// create begins an upload, which is aborted in the end.
func (t *storeTest) create(key artifact.Key, size int64) cache.Upload {
	t.Helper()
	upload, err := t.store.Create(t.ctx, key, size)
	t.noError("Create", err)
	t.Cleanup(upload.Abort)
	return upload
}

func (t *storeTest) write(upload cache.Upload, p []byte) {
	t.Helper()
	if n, err := upload.Write(p); n != len(p) || err != nil {
		t.Fatalf("Write returned %d, %v for %d bytes", n, err, len(p))
	}
}

// commit commits the upload of a, and returns what is known of it then.
func (t *storeTest) commit(upload cache.Upload, a sample) artifact.Info {
	t.Helper()
	info, err := upload.Commit(t.ctx, a.info)
	t.noError("Commit", err)
	unstored := info
	unstored.Scope, unstored.StoredAt = artifact.DefaultScope, time.Time{}
	if unstored != a.info {
		t.Fatalf("Commit returned %+v for %+v", info, a.info)
	}
	return info
}

// put uploads a.
func (t *storeTest) put(a sample) artifact.Info {
	t.Helper()
	upload := t.create(a.info.Key, a.info.Size)
	t.write(upload, a.content)
	return t.commit(upload, a)
}

// serves makes sure that a is stored, with info.
func (t *storeTest) serves(a sample, info artifact.Info) {
	t.Helper()
	t.noError("look at what must be stored", served(t.ctx, t.store, a, info))
}

// served returns an error unless a is stored, with info.
func served(ctx context.Context, store cache.Store, a sample, info artifact.Info) error {
	file, opened, err := store.Open(ctx, a.info.Key)
	if err != nil {
		return fmt.Errorf("Open: %w", err)
	}
	content, err := io.ReadAll(file)
	if closed := file.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return fmt.Errorf("read: %w", err)
	}
	if !bytes.Equal(content, a.content) {
		return fmt.Errorf("the %d bytes are not the %d that were uploaded", len(content), len(a.content))
	}
	if !same(opened, info) {
		return fmt.Errorf("Open returned %+v, Commit %+v", opened, info)
	}
	stat, err := store.Stat(ctx, a.info.Key)
	if err != nil {
		return fmt.Errorf("Stat: %w", err)
	}
	if !same(stat, info) {
		return fmt.Errorf("Stat returned %+v, Commit %+v", stat, info)
	}
	return nil
}

// same says whether two Infos are equal, in whatever time zone.
func same(a, b artifact.Info) bool {
	sameTime := a.StoredAt.Equal(b.StoredAt)
	a.StoredAt, b.StoredAt = time.Time{}, time.Time{}
	return sameTime && a == b
}

// lacks makes sure that nothing is stored under key.
func (t *storeTest) lacks(key artifact.Key) {
	t.Helper()
	file, _, err := t.store.Open(t.ctx, key)
	if err == nil {
		file.Close()
	}
	if !errors.Is(err, cache.ErrNotFound) {
		t.Errorf("Open of what is not stored returned %v, want %v", err, cache.ErrNotFound)
	}
	if _, err := t.store.Stat(t.ctx, key); !errors.Is(err, cache.ErrNotFound) {
		t.Errorf("Stat of what is not stored returned %v, want %v", err, cache.ErrNotFound)
	}
}

func (t *storeTest) noError(what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}
