package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

// This file asks a server what its index knows, and compares that with the storage directory.

// askJSON makes a request to a server whose answer is JSON, as is its body if there is a request.
func askJSON(address, method, target string, request, response proto.Message) error {
	var body io.Reader
	if request != nil {
		text, err := protojson.Marshal(request)
		if err != nil {
			return err
		}
		body = bytes.NewReader(text)
	}
	r, err := http.NewRequest(method, "http://"+address+target, body)
	if err != nil {
		return err
	}
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	answer, err := transport.RoundTrip(r)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		return err
	}
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("%s %s: %s: %s", method, target, answer.Status, text)
	}
	return protojson.Unmarshal(text, response)
}

// statistics returns what GET /v1/stats says. The index then has what happened before.
func statistics(address string) (*cachev1.GetCacheStatsResponse, error) {
	stats := &cachev1.GetCacheStatsResponse{}
	return stats, askJSON(address, http.MethodGet, "/v1/stats", nil, stats)
}

// completes waits until the index of a server is complete, and returns the statistics then.
func completes(address string) (*cachev1.GetCacheStatsResponse, error) {
	const longest = 5 * time.Minute // it is more than a minute if it has to be tried again
	for deadline := time.Now().Add(longest); ; time.Sleep(10 * time.Millisecond) {
		stats, err := statistics(address)
		if err == nil && stats.GetIndexComplete() {
			return stats, nil
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("the index is not complete after %v: %w", longest, err)
		}
	}
}

// pages returns a page of a list.
type pages func(token string) (*cachev1.ListArtifactsResponse, error)

// overREST lists over REST what the parameters of a query ask for.
func overREST(address, query string) pages {
	return func(token string) (*cachev1.ListArtifactsResponse, error) {
		page := &cachev1.ListArtifactsResponse{}
		return page, askJSON(address, http.MethodGet, "/v1/artifacts?"+query+"&page_token="+token, nil, page)
	}
}

// overGRPC lists over gRPC.
func overGRPC(service cachev1.ArtifactServiceClient, request *cachev1.ListArtifactsRequest) pages {
	return func(token string) (*cachev1.ListArtifactsResponse, error) {
		request.PageToken = token
		return service.ListArtifacts(context.Background(), request)
	}
}

// listed returns what a list has, on all its pages, by key.
func listed(page pages) (map[artifact.Key]*cachev1.StoredArtifact, error) {
	all := map[artifact.Key]*cachev1.StoredArtifact{}
	for token := ""; ; {
		answer, err := page(token)
		if err != nil {
			return nil, err
		}
		for _, a := range answer.GetArtifacts() {
			key, err := artifact.ParseKey(a.GetArtifact().GetCacheKey())
			if err != nil {
				return nil, err
			}
			if all[key] != nil {
				return nil, fmt.Errorf("%s is listed twice", key)
			}
			all[key] = a
		}
		if token = answer.GetNextPageToken(); token == "" {
			return all, nil
		}
	}
}

// storedFile is what a storage directory has of an artifact.
type storedFile struct {
	size, diskSize int64
	storedAt       time.Time
}

// filesIn returns the artifacts in a storage directory.
func filesIn(dir string) (map[artifact.Key]storedFile, error) {
	paths, err := filepath.Glob(filepath.Join(dir, "??", "??", "*.zst"))
	if err != nil {
		return nil, err
	}
	files := map[artifact.Key]storedFile{}
	for _, path := range paths {
		digits := strings.TrimSuffix(path, ".zst")
		key, err := artifact.ParseKey(filepath.Base(digits))
		if err != nil {
			return nil, err
		}
		stat, err := os.Lstat(path)
		if err != nil {
			return nil, err
		}
		file := storedFile{size: stat.Size(), storedAt: stat.ModTime()}
		file.diskSize, _ = blocks(stat)
		if memo, err := os.Lstat(digits + ".json"); err == nil {
			size, _ := blocks(memo)
			file.diskSize += size
		}
		files[key] = file
	}
	return files, nil
}

// agrees waits until the index of a server is complete, and returns where it differs from the storage
// directory. Nobody may store or remove anything meanwhile.
func agrees(address, dir string) error {
	stats, err := completes(address)
	if err != nil {
		return err
	}
	known, err := listed(overREST(address, "page_size=150"))
	if err != nil {
		return err
	}
	files, err := filesIn(dir)
	if err != nil {
		return err
	}
	var wrong []error
	var size, diskSize int64
	for key, file := range files {
		size += file.size
		diskSize += file.diskSize
		a := known[key]
		switch {
		case a == nil:
			wrong = append(wrong, fmt.Errorf("%s is stored, but not listed", key))
		case a.GetArtifact().GetSize() != file.size || a.GetDiskSize() != file.diskSize || !a.GetArtifact().GetStoredAt().AsTime().Equal(file.storedAt):
			wrong = append(wrong, fmt.Errorf("%s is listed as %v, but stored as %+v", key, a, file))
		}
	}
	for key := range known {
		if _, stored := files[key]; !stored {
			wrong = append(wrong, fmt.Errorf("%s is listed, but not stored", key))
		}
	}
	if total := stats.GetTotal(); total.GetArtifactCount() != int64(len(files)) || total.GetSize() != size || total.GetDiskSize() != diskSize {
		wrong = append(wrong, fmt.Errorf("statistics are of %d artifacts of %d bytes that take %d, but stored are %d of %d that take %d",
			total.GetArtifactCount(), total.GetSize(), total.GetDiskSize(), len(files), size, diskSize))
	}
	if more := len(wrong) - 10; more > 0 {
		wrong = append(wrong[:10], fmt.Errorf("and %d more", more))
	}
	return errors.Join(wrong...)
}

// diskUsage returns how many bytes everything in a directory takes on the disk. What comes or goes meanwhile
// counts or does not.
func diskUsage(dir string) (size int64) {
	seen := map[any]bool{} // a file that has two names counts once
	filepath.WalkDir(dir, func(_ string, entry fs.DirEntry, err error) error {
		if err != nil {
			return nil // it is gone
		}
		if stat, err := entry.Info(); err == nil {
			if taken, id := blocks(stat); !seen[id] {
				seen[id] = true
				size += taken
			}
		}
		return nil
	})
	return size
}

// TestAgreesSeesDifferences checks that agrees sees where an index and its directory differ.
func TestAgreesSeesDifferences(t *testing.T) {
	dir := t.TempDir()
	p := startProgram(t, "polykit-cache", dir)
	ways := newWays(p.address)
	defer func() {
		for _, way := range ways {
			way.close()
		}
	}()
	path := func(key artifact.Key) string { return filepath.Join(dir, shardOf(key), key.String()) }
	var keys []artifact.Key
	for i := range 400 { // on several pages
		key := cachetest.Key(fmt.Sprint(i))
		data := cachetest.Random(key, 10)
		if status, err := ways[i%len(ways)].put(key, int64(len(data)), bytes.NewReader(data)); status != http.StatusCreated {
			t.Fatal(status, err)
		}
		keys = append(keys, key)
	}
	if err := agrees(p.address, dir); err != nil {
		t.Fatalf("before the damage: %v", err)
	}
	stranger := cachetest.Key("stranger")
	if err := errors.Join(
		os.Remove(path(keys[0])+".zst"),
		os.Truncate(path(keys[1])+".zst", 5000),
		os.Chtimes(path(keys[2])+".zst", time.Time{}, time.Unix(1, 0)),
		os.Truncate(path(keys[3])+".json", 0),
		os.MkdirAll(filepath.Dir(path(stranger)), 0o755),
		os.WriteFile(path(stranger)+".zst", []byte("anything"), 0o644),
	); err != nil {
		t.Fatal(err)
	}
	err := agrees(p.address, dir)
	if err == nil {
		t.Fatal("no difference was seen")
	}
	for _, want := range []string{
		keys[0].String() + " is listed, but not stored",
		keys[1].String() + " is listed as ",
		keys[2].String() + " is listed as ",
		keys[3].String() + " is listed as ",
		stranger.String() + " is stored, but not listed",
		"statistics are of 400 artifacts ",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q was not seen, but only\n%v", want, err)
		}
	}
	if lines := strings.Count(err.Error(), "\n") + 1; lines != 6 {
		t.Errorf("%d differences were seen; want 6:\n%v", lines, err)
	}
}

// TestIndexRemoved removes the index of a server that runs, or breaks it. It is made anew.
func TestIndexRemoved(t *testing.T) {
	for name, remove := range map[string]func(own string) error{
		"removed":                    func(own string) error { return os.Remove(filepath.Join(own, "index.db")) },
		"removed with its directory": os.RemoveAll,
		"removed with its files":     func(own string) error { return errors.Join(os.RemoveAll(own), os.Mkdir(own, 0o755)) },
		"in the way is something": func(own string) error {
			return errors.Join(os.RemoveAll(own), os.MkdirAll(filepath.Join(own, "index.db", "x"), 0o755))
		},
		"replaced by an empty one": func(own string) error {
			return errors.Join(os.RemoveAll(own), os.Mkdir(own, 0o755), os.WriteFile(filepath.Join(own, "index.db"), nil, 0o644))
		},
		"replaced by something wrong": func(own string) error {
			return errors.Join(os.RemoveAll(own), os.Mkdir(own, 0o755), os.WriteFile(filepath.Join(own, "index.db"), []byte(strings.Repeat("wrong", 5000)), 0o644))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			p := startProgram(t, "polykit-cache", dir)
			ways := newWays(p.address)
			defer func() {
				for _, way := range ways {
					way.close()
				}
			}()
			put := func(name string) {
				key := cachetest.Key(name)
				data := cachetest.Random(key, 10)
				if status, err := ways[0].put(key, int64(len(data)), bytes.NewReader(data)); status != http.StatusCreated {
					t.Errorf("PUT: %d, %v", status, err)
				}
			}
			put("before")
			if err := agrees(p.address, dir); err != nil {
				t.Fatal(err)
			}
			if err := remove(filepath.Join(dir, ".polykit-cache")); err != nil {
				t.Fatal(err)
			}
			put("behind it")
			if err := agrees(p.address, dir); err != nil {
				t.Error(err)
			}
			if err := p.Process.Signal(os.Interrupt); err != nil {
				t.Fatal(err)
			}
			p.ends(t)
			p = startProgram(t, "polykit-cache", dir)
			if stats, err := statistics(p.address); err != nil || !stats.GetIndexComplete() {
				t.Errorf("after an end in good order statistics are %v, %v", stats, err)
			}
			if err := agrees(p.address, dir); err != nil {
				t.Error(err)
			}
		})
	}
}
