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
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
	"github.com/polykit/polykit-cache/internal/client"
)

// allFaults is set, to anything, for every fault to be tried, and not only the first of each row of
// some tables.
const allFaults = "POLYKIT_CACHE_TEST_FAULTS"

// faultSize is the size of an artifact that takes several calls to write and read.
const faultSize = 300_000

func several(key artifact.Key) []byte { return cachetest.Random(key, faultSize) }

// tiny returns an artifact that takes one.
func tiny(key artifact.Key) []byte {
	return cachetest.Sound(key, map[string]string{"stdout.txt": "done"})
}

// large returns an artifact of which a part is on its way to the disk while the rest is written.
func large(key artifact.Key) []byte { return cachetest.Random(key, 9<<20) }

// A table of faults lists the calls that a server makes on files for one request, in order; a call that
// is repeated at once stands there once. The faults of each call follow, with the outcome of each: a
// status; "cut" for a connection that was; how the server ended. That of "kill" is the status of
// another upload when the server runs again. See inject for the faults.

// putFaults is what commit.go describes.
const putFaults = `
newfstatat aa/bb/KEY.zst   EIO=201 EACCES=201 kill=201 EIO+=500
statfs .                   EIO=500 EACCES=500 kill=201
openat tmp/1               EMFILE=503 ENOSPC=507 EDQUOT=507 ENFILE=503 EIO=500 EACCES=201 EACCES+=500 EROFS=500 kill=201 EMFILE+=503
write tmp/1                ENOSPC=507 EDQUOT=507 EIO=500 none=500 short=500 kill=201
utimensat tmp/1            EIO=500 EACCES=500 ENOSPC=507 kill=201 EIO+=500
fsync tmp/1                EIO=500 ENOSPC=507 EDQUOT=507 kill=201 EIO+=500
fstat tmp/1                EIO=500 kill=201
mkdirat aa                 ENOSPC=507 EDQUOT=507 EIO=500 EACCES=201 kill=201 ENOSPC+=507 EACCES+=500
newfstatat aa              EIO=201 EACCES=201 kill=201
openat .                   EMFILE=503 ENFILE=503 EIO=500 EACCES=201 kill=201
fsync .                    EIO=500 ENOSPC=507 kill=201 EIO+=500
close .                    EIO=500 kill=201
mkdirat aa/bb              ENOSPC=507 EDQUOT=507 EIO=500 EACCES=201 kill=201
newfstatat aa/bb           EIO=201 EACCES=201 kill=201
openat aa                  EMFILE=503 ENFILE=503 EIO=500 EACCES=201 kill=201
fsync aa                   EIO=500 ENOSPC=507 kill=201
close aa                   EIO=500 kill=201
linkat aa/bb/KEY.zst       ENOSPC=507 EDQUOT=507 EIO=500 EACCES=201 EACCES+=500 EMLINK=500 EROFS=500 kill=201 EIO+=500 ENOSPC+=507
close tmp/1                EIO=201 kill=409 EIO+=500
unlinkat tmp/1             EIO=201 EACCES=201 kill=409 EIO+=500
openat tmp/2               EMFILE=201 ENOSPC=201 EIO=201 EACCES=201 kill=409 EMFILE+=503 ENOSPC+=507
write tmp/2                ENOSPC=201 EIO=201 none=201 short=201 kill=409
close tmp/2                EIO=201 kill=409
newfstatat aa/bb/KEY.json  EIO=201 kill=409
renameat aa/bb/KEY.json    ENOSPC=201 EIO=201 EACCES=201 kill=409 EIO+=500
openat aa/bb               EMFILE=503 EIO=500 EACCES=201 ENFILE=503 kill=409 EMFILE+=503
fsync aa/bb                EIO=500 ENOSPC=507 EDQUOT=507 kill=409 EIO+=500
close aa/bb                EIO=500 kill=409
newfstatat aa/bb/KEY.zst   EIO=201 EACCES=201 kill=409 EIO+=201
newfstatat aa/bb/KEY.json  EIO=201 EACCES=201 kill=409
`

// chunkedFaults is an upload of unknown size, which asks for the space of each piece.
const chunkedFaults = `
newfstatat aa/bb/KEY.zst   EIO=201
statfs .                   EIO=500
openat tmp/1               ENOSPC=507
statfs .                   EIO=500 ENOSPC=507 kill=201
write tmp/1                ENOSPC=507 EIO=500 none=500 short=500 kill=201
utimensat tmp/1            EIO=500
fsync tmp/1                EIO=500 ENOSPC=507
fstat tmp/1                EIO=500
mkdirat aa                 ENOSPC=507
newfstatat aa              EIO=201
openat .                   EMFILE=503
fsync .                    EIO=500
close .                    EIO=500
mkdirat aa/bb              ENOSPC=507
newfstatat aa/bb           EIO=201
openat aa                  EMFILE=503
fsync aa                   EIO=500
close aa                   EIO=500
linkat aa/bb/KEY.zst       ENOSPC=507
close tmp/1                EIO=201
unlinkat tmp/1             EIO=201
openat tmp/2               EMFILE=201
write tmp/2                ENOSPC=201
close tmp/2                EIO=201
newfstatat aa/bb/KEY.json  EIO=201
renameat aa/bb/KEY.json    EIO=201
openat aa/bb               EMFILE=503
fsync aa/bb                EIO=500
close aa/bb                EIO=500
newfstatat aa/bb/KEY.zst   EIO=201
newfstatat aa/bb/KEY.json  EIO=201
`

// largeFaults is an upload whose way to the disk begins before it is there as a whole, or does not: only
// fsync promises that it ends.
const largeFaults = `
newfstatat aa/bb/KEY.zst
statfs .
openat tmp/1
write tmp/1
sync_file_range tmp/1      EIO=201 ENOSPC=201 ESPIPE=201 ENOSYS=201 kill=201
write tmp/1                ENOSPC=507 EIO=500 none=500 short=500 kill=201
utimensat tmp/1
fsync tmp/1                EIO=500 ENOSPC=507
fstat tmp/1
mkdirat aa
newfstatat aa
openat .
fsync .
close .
mkdirat aa/bb
newfstatat aa/bb
openat aa
fsync aa
close aa
linkat aa/bb/KEY.zst
close tmp/1
unlinkat tmp/1
openat tmp/2
write tmp/2
close tmp/2
newfstatat aa/bb/KEY.json
renameat aa/bb/KEY.json
openat aa/bb
fsync aa/bb
close aa/bb
newfstatat aa/bb/KEY.zst
newfstatat aa/bb/KEY.json
`

// existingFaults is an upload of what is stored: it is refused, or nobody knows.
const existingFaults = `
newfstatat aa/bb/KEY.zst   EIO=500 EACCES=409 EACCES+=500
openat aa/bb/KEY.json      EMFILE=409 EIO=409 EACCES=409 EMFILE+=503
read aa/bb/KEY.json        EIO=409 none=409
close aa/bb/KEY.json       EIO=409
`

// getFaults is a download. Without its memo an artifact is verified.
const getFaults = `
openat aa/bb/KEY.zst       EACCES=200 EMFILE=503 ENFILE=503 EIO=500 kill=409 EMFILE+=503 EIO+=500
fstat aa/bb/KEY.zst        EIO=500 EACCES=500
openat aa/bb/KEY.json      EMFILE=200 ENFILE=200 EIO=200 EACCES=200 EMFILE+=503 EIO+=500
read aa/bb/KEY.json        EIO=200 none=200
close aa/bb/KEY.json       EIO=200
read aa/bb/KEY.zst         EIO=cut none=cut
sendfile aa/bb/KEY.zst     EIO=cut none=cut kill=409
close aa/bb/KEY.zst        EIO=200
`

// smallFaults is a download of an artifact that is read into memory, and againFaults one of what is there.
const smallFaults = `
openat aa/bb/KEY.zst       EACCES=200 EMFILE=503 EIO=500 kill=409 EMFILE+=503 EIO+=500
fstat aa/bb/KEY.zst        EIO=500
openat aa/bb/KEY.json      EMFILE=200 EIO=200
read aa/bb/KEY.json        EIO=200
close aa/bb/KEY.json       EIO=200
pread64 aa/bb/KEY.zst      EIO=200 none=200 kill=409
close aa/bb/KEY.zst        EIO=200
`

const againFaults = `
newfstatat aa/bb/KEY.zst   EIO=200 EACCES=200 kill=409 EIO+=500
`

const headFaults = `
newfstatat aa/bb/KEY.zst   EIO=500 EACCES=200 EACCES+=500 EIO+=500
openat aa/bb/KEY.json      EMFILE=200 EIO=200 EACCES=200 EMFILE+=503
read aa/bb/KEY.json        EIO=200 none=200
close aa/bb/KEY.json       EIO=200
`

// remakeFaults is a download without a memo, which is made anew.
const remakeFaults = `
openat aa/bb/KEY.zst       EMFILE=503 EIO=500 EACCES=200 EMFILE+=503
fstat aa/bb/KEY.zst        EIO=500
openat aa/bb/KEY.json      EMFILE=200 EIO=200 EACCES=200 EMFILE+=503
openat aa/bb/KEY.zst       EMFILE=503 EIO=500 EACCES=200 EMFILE+=503
fstat aa/bb/KEY.zst        EIO=500
openat aa/bb/KEY.json      EMFILE=200 EIO=200 EACCES=200
read aa/bb/KEY.zst         EIO=500 kill=409
fsync aa/bb/KEY.zst        EIO=200 ENOSPC=200 EIO+=200
newfstatat aa/bb/KEY.zst   EIO=200
openat aa/bb/KEY.json      EMFILE=200 EIO=200 EACCES=200
openat tmp/1               EMFILE=200 ENOSPC=200 EIO=200 EACCES=200 EROFS=200 kill=409
write tmp/1                ENOSPC=200 EIO=200 none=200 short=200 kill=409
close tmp/1                EIO=200
newfstatat aa/bb/KEY.json  EIO=200
renameat aa/bb/KEY.json    EIO=200 ENOSPC=200 EACCES=200 kill=409
newfstatat aa/bb/KEY.zst   EIO=200 EACCES=200 kill=409
newfstatat aa/bb/KEY.json  EIO=200 EACCES=200 kill=409
close aa/bb/KEY.zst        EIO=200
read aa/bb/KEY.zst         EIO=cut none=cut
sendfile aa/bb/KEY.zst     EIO=cut
close aa/bb/KEY.zst        EIO=200
`

// damagedFaults is a download of what is cut short, and so is moved to quarantine.
const damagedFaults = `
openat aa/bb/KEY.zst                   EMFILE=503 EIO=500
fstat aa/bb/KEY.zst                    EIO=500
openat aa/bb/KEY.json                  EMFILE=404 EIO=404
read aa/bb/KEY.json                    EIO=404
close aa/bb/KEY.json                   EIO=404
openat aa/bb/KEY.zst                   EMFILE=503 EIO=500
fstat aa/bb/KEY.zst                    EIO=500
openat aa/bb/KEY.json                  EMFILE=404 EIO=404
read aa/bb/KEY.json                    EIO=404
close aa/bb/KEY.json                   EIO=404
read aa/bb/KEY.zst                     EIO=500 kill=201
newfstatat aa/bb/KEY.zst               EIO=404 kill=201
newfstatat aa/bb/KEY.json              EIO=404 EACCES=404 kill=201
unlinkat aa/bb/KEY.json                EIO=404 EACCES=404 kill=201
newfstatat .polykit-cache/quarantine   EIO=404
newfstatat .polykit-cache              EIO=404
mkdirat .polykit-cache/quarantine      ENOSPC=404 EIO=404 EACCES=404 ENOSPC+=507 kill=201
newfstatat .polykit-cache/quarantine/1.zst  EIO=404
renameat .polykit-cache/quarantine/1.zst    EIO=404 ENOSPC=404 EACCES=404 EIO+=500 ENOSPC+=507 kill=201
newfstatat .polykit-cache/quarantine/1.zst  EIO=404 EACCES=404 kill=201
openat .polykit-cache/quarantine/1.txt      ENOSPC=404 EMFILE=404 kill=201
write .polykit-cache/quarantine/1.txt       ENOSPC=404 EIO=404 kill=201
close .polykit-cache/quarantine/1.txt       EIO=404
close .polykit-cache/quarantine/1.zst       EIO=404
`

// filesFaults is a list of the files in an artifact, which is verified for it.
const filesFaults = `
openat aa/bb/KEY.zst       EMFILE=503 EIO=500 EACCES=200
fstat aa/bb/KEY.zst        EIO=500
openat aa/bb/KEY.json      EMFILE=200 EIO=200
read aa/bb/KEY.json        EIO=200
close aa/bb/KEY.json       EIO=200
read aa/bb/KEY.zst         EIO=500
close aa/bb/KEY.zst        EIO=200
`

// readyFaults is GET /readyz, which says 503 whatever is wrong.
const readyFaults = `
openat tmp/1               EMFILE=503 ENOSPC=503 EIO=503 EACCES=200 EACCES+=503 EROFS=503 kill=201
write tmp/1                ENOSPC=503 EIO=503 none=503 kill=201
close tmp/1                EIO=200 kill=201
unlinkat tmp/1             EIO=200 kill=201
`

// step is a row of a table.
type step struct {
	call
	faults []fault
}

type fault struct{ name, outcome string }

// parseFaults reads a table.
func parseFaults(table string) []step {
	var steps []step
	for line := range strings.Lines(strings.TrimSpace(table)) {
		fields := strings.Fields(line)
		s := step{call: call{fields[0], fields[1]}}
		for _, field := range fields[2:] {
			name, outcome, _ := strings.Cut(field, "=")
			s.faults = append(s.faults, fault{name, outcome})
		}
		steps = append(steps, s)
	}
	return steps
}

// faultRig is a storage directory and the server on it.
type faultRig struct {
	*traced
	root, dir string
	data      func(artifact.Key) []byte // what is uploaded under a key
	keys      []artifact.Key
	leaked    int // descriptors whose close failed, which leaves them open here
	leftover  int // files in tmp/ whose removal failed
}

func (r *faultRig) path(parts ...string) string {
	return filepath.Join(append([]string{r.dir}, parts...)...)
}

// newKey returns a key in a shard of its own.
func (r *faultRig) newKey(t *testing.T) artifact.Key {
	t.Helper()
	if len(r.keys) == 256 {
		t.Fatal("there are no more shards")
	}
	key, err := artifact.ParseKey(fmt.Sprintf("%02xbb%028x", len(r.keys), 0))
	if err != nil {
		t.Fatal(err)
	}
	r.keys = append(r.keys, key)
	return key
}

func (r *faultRig) zst(key artifact.Key) string {
	return r.path(key.String()[:2], key.String()[2:4], key.String()+".zst")
}

func (r *faultRig) json(key artifact.Key) string {
	return strings.TrimSuffix(r.zst(key), ".zst") + ".json"
}

// request makes a request on a connection of its own and returns the outcome: the status, if all else
// of the answer is as it must be.
func (r *faultRig) request(method, path string, size int64, body io.Reader, want []byte) string {
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	request, err := http.NewRequest(method, "http://"+r.address+path, body)
	if err != nil {
		return err.Error()
	}
	request.ContentLength = size
	response, err := transport.RoundTrip(request)
	if err != nil {
		return "cut"
	}
	text, err := io.ReadAll(response.Body)
	response.Body.Close()
	if err != nil {
		return "cut"
	}
	// What follows on the connection is answered only when the handler has returned.
	if after, err := http.NewRequest(http.MethodGet, "http://"+r.address+"/healthz", nil); err == nil {
		if response, err := transport.RoundTrip(after); err == nil {
			response.Body.Close()
		}
	}
	status := fmt.Sprint(response.StatusCode)
	ok := true
	switch response.StatusCode {
	case http.StatusOK:
		ok = want == nil || method == http.MethodHead && len(text) == 0 && response.ContentLength == int64(len(want)) || bytes.Equal(text, want)
	case http.StatusCreated:
		ok = len(text) == 0
	case http.StatusNotFound:
		ok = string(text) == `{"error":"Artifact not found"}`
	case http.StatusInternalServerError:
		ok = string(text) == `{"error":"internal error"}` || method == http.MethodHead
	case http.StatusServiceUnavailable:
		ok = response.Header.Get("Retry-After") != ""
	case http.StatusInsufficientStorage:
		ok = string(text) == `{"error":"The server has no space left for this artifact"}`
	}
	if !ok {
		return fmt.Sprintf("%s, but with %v and %d bytes: %.200q", status, response.Header, len(text), text)
	}
	return status
}

func (r *faultRig) put(key artifact.Key) string {
	return r.request(http.MethodPut, "/v1/artifacts/"+key.String(), int64(len(r.data(key))), bytes.NewReader(r.data(key)), nil)
}

// putChunked uploads without a declared size.
func (r *faultRig) putChunked(key artifact.Key) string {
	return r.request(http.MethodPut, "/v1/artifacts/"+key.String(), -1, bytes.NewReader(r.data(key)), nil)
}

func (r *faultRig) putGRPC(key artifact.Key) string {
	return r.upload(key, int64(len(r.data(key))), bytes.NewReader(r.data(key)))
}

func (r *faultRig) putGRPCUndeclared(key artifact.Key) string {
	return r.upload(key, client.UnknownSize, bytes.NewReader(r.data(key)))
}

// upload uploads over gRPC, and returns the status of HTTP that fits the answer.
func (r *faultRig) upload(key artifact.Key, size int64, body io.Reader) string {
	remote, err := (&remoteFlags{server: "http://" + r.address, grpc: true}).connect(io.Discard)
	if err != nil {
		return err.Error()
	}
	defer remote.Close()
	err = remote.Put(context.Background(), key, size, body)
	if err == nil {
		return "201"
	}
	refusal, ok := errors.AsType[*client.Error](err)
	if !ok {
		return "cut"
	}
	answer := refusal.Code.String() + " " + refusal.Reason
	if status, ok := map[string]string{
		"AlreadyExists ARTIFACT_EXISTS":  "409",
		"Internal INTERNAL":              "500",
		"Unavailable OVERLOADED":         "503",
		"ResourceExhausted STORAGE_FULL": "507",
	}[answer]; ok {
		return status
	}
	return answer
}

func (r *faultRig) get(key artifact.Key) string {
	return r.request(http.MethodGet, "/v1/artifacts/"+key.String(), 0, nil, r.data(key))
}

func (r *faultRig) head(key artifact.Key) string {
	return r.request(http.MethodHead, "/v1/artifacts/"+key.String(), 0, nil, r.data(key))
}

func (r *faultRig) files(key artifact.Key) string {
	return r.request(http.MethodGet, "/v1/artifacts/"+key.String()+"/files", 0, nil, nil)
}

func (r *faultRig) ready(artifact.Key) string {
	return r.request(http.MethodGet, "/readyz", 0, nil, nil)
}

// is checks the outcome of something.
func is(t *testing.T, what, outcome string, want ...string) {
	t.Helper()
	if !slices.Contains(want, outcome) {
		t.Errorf("%s: the outcome is %s, want %s", what, outcome, strings.Join(want, " or "))
	}
}

// places compares the calls that a request made with a table's, and returns those, and the
// places of the first two of each row. An error says that they differ.
func places(events []event, steps []step) (calls []call, places [][]int, err error) {
	var rows []call
	for _, e := range events {
		if !e.begins {
			continue
		}
		calls = append(calls, e.call)
		if len(rows) == 0 || rows[len(rows)-1] != e.call {
			rows = append(rows, e.call)
			places = append(places, nil)
		}
		if last := &places[len(places)-1]; len(*last) < 2 {
			*last = append(*last, len(calls)-1)
		}
	}
	if !slices.EqualFunc(rows, steps, func(c call, s step) bool { return c == s.call }) {
		var happened strings.Builder
		for _, row := range rows {
			fmt.Fprintln(&happened, row)
		}
		return nil, nil, fmt.Errorf("the table is not of the calls that happened, which are\n%s", &happened)
	}
	return calls, places, nil
}

// eachFault runs a test for each fault of a table that is to be tried: all, or the first of each row.
func eachFault(t *testing.T, steps []step, places [][]int, test func(t *testing.T, place int, f fault)) {
	for row, s := range steps {
		for i, f := range s.faults {
			if i > 0 && os.Getenv(allFaults) == "" {
				break
			}
			for again, place := range places[row] {
				if again > 0 && os.Getenv(allFaults) == "" {
					break
				}
				name := fmt.Sprint(s.call, " ", f.name)
				if again > 0 {
					name += " again"
				}
				t.Run(strings.ReplaceAll(name, "/", ":"), func(t *testing.T) { test(t, place, f) })
			}
		}
	}
}

// TestFaults makes each call on files fail in turn, of each request, on the real program. Whatever
// fails, the client is told the right thing, nothing is left behind, the server goes on, and what
// failed works as soon as the fault is gone.
func TestFaults(t *testing.T) {
	store := func(t *testing.T, r *faultRig, key artifact.Key) {
		is(t, "PUT before the fault", r.put(key), "201")
	}
	for _, test := range []struct {
		name, table string
		short       bool // it is tried in the short form too
		prepare     func(t *testing.T, r *faultRig, key artifact.Key)
		request     func(r *faultRig, key artifact.Key) string
		unfailed    string // the outcome without a fault
		after       string // the outcome of an upload after that
	}{
		{"put", putFaults, true, nil, (*faultRig).put, "201", "409"},
		{"grpc", putFaults, false, nil, (*faultRig).putGRPC, "201", "409"},
		{"chunked", chunkedFaults, false, nil, (*faultRig).putChunked, "201", "409"},
		{"large", largeFaults, true, nil, (*faultRig).put, "201", "409"},
		{"existing", existingFaults, true, store, (*faultRig).put, "409", "409"},
		{"get", getFaults, true, store, (*faultRig).get, "200", "409"},
		{"small", smallFaults, false, store, (*faultRig).get, "200", "409"},
		{"again", againFaults, true, func(t *testing.T, r *faultRig, key artifact.Key) {
			store(t, r, key)
			is(t, "GET before the fault", r.get(key), "200")
		}, (*faultRig).get, "200", "409"},
		{"head", headFaults, false, store, (*faultRig).head, "200", "409"},
		{"remake", remakeFaults, true, func(t *testing.T, r *faultRig, key artifact.Key) {
			store(t, r, key)
			if err := os.Remove(r.json(key)); err != nil {
				t.Error(err)
			}
		}, (*faultRig).get, "200", "409"},
		{"damaged", damagedFaults, true, func(t *testing.T, r *faultRig, key artifact.Key) {
			store(t, r, key)
			if err := os.Truncate(r.zst(key), faultSize/2); err != nil {
				t.Error(err)
			}
			if err := os.RemoveAll(r.path(".polykit-cache", "quarantine")); err != nil { // so that it is made each time
				t.Error(err)
			}
		}, (*faultRig).get, "404", "201"},
		{"files", filesFaults, false, store, (*faultRig).files, "200", "409"},
		{"ready", readyFaults, false, nil, (*faultRig).ready, "200", "201"},
	} {
		if !test.short && os.Getenv(allFaults) == "" {
			continue
		}
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			root := t.TempDir()
			r := &faultRig{root: root, dir: filepath.Join(root, "store"), data: several}
			switch test.name {
			case "chunked", "small", "again":
				r.data = tiny
			case "large":
				r.data = large
			}
			r.traced = start(t, r.dir)
			control := r.newKey(t)
			store(t, r, control)

			begin := func(t *testing.T) (artifact.Key, *names, func() string) {
				key := r.newKey(t)
				if test.prepare != nil {
					test.prepare(t, r, key)
				}
				return key, newNames(root, r.dir, key), func() string { return test.request(r, key) }
			}
			steps := parseFaults(test.table)
			var calls []call
			var rows [][]int
			for try, differ := 1, error(nil); try == 1 || differ != nil; try++ {
				if try > 3 {
					t.Fatal(differ)
				}
				key, n, request := begin(t)
				outcome, events := watch(t, r.traced, n, request)
				is(t, "without a fault", outcome, test.unfailed)
				// The index may look at an artifact that was just missed before strace ends.
				calls, rows, differ = places(events, steps)
				is(t, "PUT after it", r.put(key), test.after)
			}

			outer := t // whose end the servers live to
			eachFault(t, steps, rows, func(t *testing.T, place int, f fault) {
				if time.Since(r.began) > mostAge {
					is(t, "the end", r.stop(), "exit 0")
					r.traced, r.leaked, r.leftover = start(outer, r.dir), 0, 0
				}
				key, n, request := begin(t)
				outcome, missed := inject(t, r.traced, n, calls, place, f.name, request)
				// strace does not always see the first call of a thread behind which it was attached anew.
				for try := 1; missed != nil && try < 3; try++ {
					t.Logf("once more, since %v", missed)
					is(t, "without the fault", outcome, test.unfailed)
					is(t, "PUT without the fault", r.put(key), test.after) // for it is among what must be there at the end
					key, n, request = begin(t)
					outcome, missed = inject(t, r.traced, n, calls, place, f.name, request)
				}
				if missed != nil {
					t.Error(missed)
				}
				after := []string{test.after}
				switch {
				case f.name == "kill":
					r.traced, r.leaked, r.leftover = start(outer, r.dir), 0, 0
					after = []string{f.outcome}
				case test.prepare == nil && strings.HasSuffix(f.name, "+"): // it could not take back what it did
					after = []string{"201", "409"}
				case test.prepare == nil && outcome != test.unfailed:
					after = []string{"201"}
				}
				if f.name != "kill" {
					is(t, "with the fault", outcome, f.outcome)
				}
				if calls[place].name == "close" && f.name == "EIO" {
					r.leaked++ // since it did nothing
				}
				if files := r.list(t, "tmp"); f.name != "kill" && (strings.HasSuffix(f.name, "+") || calls[place].name == "unlinkat") {
					r.leftover = len(files)
				} else if len(files) != r.leftover {
					t.Errorf("in tmp/: %q", files)
				}
				if open := r.openBelow(t, r.dir); len(open) != 1+r.leaked {
					t.Errorf("open files: %q", open)
				}
				r.quarantined(t)
				is(t, "GET of another artifact", r.get(control), "200")
				if test.unfailed == "404" {
					is(t, "GET after the fault", r.get(key), "404")
				}
				is(t, "PUT after the fault", r.put(key), after...)
				is(t, "GET of what was uploaded", r.get(key), "200")
			})

			is(t, "the end", r.stop(), "exit 0")
			r.traced = start(t, r.dir)
			r.audit(t)
			is(t, "the end", r.stop(), "exit 0")
		})
	}
}

// mostAge is how old a server may be at which is looked: after a minute the collector looks at every directory.
const mostAge = 40 * time.Second

// startFaults is a start for which everything is to be made.
const startFaults = `
newfstatat .               EIO=1 EACCES=1 kill EIO+=1
newfstatat ..              EIO=1
newfstatat ../..           EIO=1
mkdirat ..                 ENOSPC=1 EACCES=1 EROFS=1 kill
openat ../..               EMFILE=1 EACCES=1
fsync ../..                EIO=1 kill
close ../..                EIO=1
mkdirat .                  ENOSPC=1 EACCES=1 kill
openat ..                  EMFILE=1 EACCES=1
fsync ..                   EIO=1 kill
close ..                   EIO=1
newfstatat tmp             EIO=listening
newfstatat .               EIO=listening
mkdirat tmp                ENOSPC=1 EACCES=1 EIO=1 kill
openat .polykit-cache.lock EMFILE=1 EACCES=1 ENOSPC=1 EROFS=1 kill
flock .polykit-cache.lock  ENOLCK=1 EAGAIN=1 kill
openat tmp                 EMFILE=1 EIO=1 EACCES=1
getdents64 tmp             EIO=1 kill
close tmp                  EIO=listening
statfs .                   EIO=1 EACCES=1 kill
newfstatat .polykit-cache  EIO=listening EACCES=listening
newfstatat .               EIO=listening
mkdirat .polykit-cache     ENOSPC=listening EACCES=listening EROFS=listening kill ENOSPC+=listening
`

// restartFaults is a start with two files in tmp/ that are to be swept: one of this server's, and one
// of another program's.
const restartFaults = `
newfstatat .               EIO=1
newfstatat tmp             EIO=listening
openat .polykit-cache.lock EMFILE=1
flock .polykit-cache.lock  ENOLCK=1
openat tmp                 EMFILE=1 EACCES=1
getdents64 tmp             EIO=1
close tmp                  EIO=listening
unlinkat tmp/1             EIO=listening kill EIO+=1 EACCES+=1
newfstatat tmp/2           EIO=listening kill
unlinkat tmp/2             EIO=listening kill EIO+=1
statfs .                   EIO=1 kill
newfstatat .polykit-cache  EIO=listening kill EIO+=listening
newfstatat .               EIO=listening
mkdirat .polykit-cache     ENOSPC=listening kill
`

// stopFaults is the end of a server, which nothing can stop.
const stopFaults = `
flock .polykit-cache.lock  EIO=0 kill
close .polykit-cache.lock  EIO=0 kill
`

// TestStartFaults makes each call on files fail in turn at the start and the end of a server. One that
// can't start says why, and the next one starts.
func TestStartFaults(t *testing.T) {
	key, err := artifact.ParseKey("01bb0000000000000000000000000000")
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name, table string
		prepare     func(t *testing.T, r *faultRig)
		request     func(r *faultRig) string
		unfailed    string
	}{
		{"start", startFaults, func(*testing.T, *faultRig) {}, func(r *faultRig) string { return r.begin() }, "listening"},
		{"restart", restartFaults, func(t *testing.T, r *faultRig) {
			swept := []string{r.path("tmp", key.String()+"-A.part"), r.path("tmp", "foreign")}
			if err := os.MkdirAll(r.path("tmp"), 0o755); err != nil {
				t.Fatal(err)
			}
			for _, path := range swept {
				if err := errors.Join(os.WriteFile(path, nil, 0o644), os.Chtimes(path, time.Time{}, time.Unix(1, 0))); err != nil {
					t.Fatal(err)
				}
			}
		}, func(r *faultRig) string { return r.begin() }, "listening"},
		{"stop", stopFaults, func(t *testing.T, r *faultRig) {
			is(t, "the start", r.begin(), "listening")
			r.settle()
			is(t, "PUT before the end", r.put(key), "201")
		}, func(r *faultRig) string { return r.stop() }, "exit 0"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			begin := func(t *testing.T) (*faultRig, *names, func() string) {
				root := t.TempDir()
				r := &faultRig{root: root, dir: filepath.Join(root, "new", "store"), data: several, keys: []artifact.Key{key}}
				if test.name == "restart" {
					test.prepare(t, r)
				}
				r.traced = hold(t, r.dir)
				if test.name != "restart" {
					test.prepare(t, r)
				}
				n := newNames(root, r.dir, key)
				for _, name := range r.list(t, "tmp") {
					n.name(r.path("tmp", name))
				}
				return r, n, func() string { return test.request(r) }
			}
			// after checks that a server starts on the directory, and that nothing is wrong there.
			after := func(t *testing.T, r *faultRig) {
				if r.ended != "" {
					r.traced = start(t, r.dir)
				}
				is(t, "PUT after it", r.put(key), map[bool]string{false: "201", true: "409"}[test.name == "stop"])
				is(t, "the end", r.stop(), "exit 0")
				r.traced = start(t, r.dir)
				r.audit(t)
				is(t, "the end", r.stop(), "exit 0")
			}
			steps := parseFaults(test.table)
			r, n, request := begin(t)
			outcome, events := watch(t, r.traced, n, request)
			is(t, "without a fault", outcome, test.unfailed)
			calls, rows, differ := places(events, steps)
			if differ != nil {
				t.Fatal(differ)
			}
			after(t, r)

			eachFault(t, steps, rows, func(t *testing.T, place int, f fault) {
				r, n, request := begin(t)
				outcome, missed := inject(t, r.traced, n, calls, place, f.name, request)
				if missed != nil {
					t.Error(missed)
				}
				switch {
				case f.name == "kill":
				case f.outcome == "listening":
					is(t, "with the fault", outcome, f.outcome)
				default:
					is(t, "with the fault", outcome, "exit "+f.outcome)
				}
				if said := r.stderr.String(); outcome == "exit 1" && (!strings.HasPrefix(said, "polykit-cache: ") || strings.Count(said, "\n") != 1) {
					t.Errorf("standard error is %q, want one line", said)
				}
				after(t, r)
			})
		})
	}
}

// list returns the names in a directory.
func (r *faultRig) list(t *testing.T, name string) []string {
	t.Helper()
	entries, err := os.ReadDir(r.path(name))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	var names []string
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names
}

// quarantined checks that nothing in quarantine is sound.
func (r *faultRig) quarantined(t *testing.T) {
	t.Helper()
	for _, name := range r.list(t, ".polykit-cache/quarantine") {
		digits, _, _ := strings.Cut(name, "-")
		key, err := artifact.ParseKey(digits)
		if err != nil {
			t.Error(err)
		}
		if content, err := os.ReadFile(r.path(".polykit-cache/quarantine", name)); err != nil || bytes.Equal(content, r.data(key)) {
			t.Errorf("in quarantine is %s, which is sound, or %v", name, err)
		}
	}
}

// audit checks that what is in the directory is the artifacts under all keys, with their memos, and that the
// index says so. The server has just started.
func (r *faultRig) audit(t *testing.T) {
	t.Helper()
	want := []string{".polykit-cache.lock"}
	for _, key := range r.keys {
		is(t, "GET at the end", r.get(key), "200")
		for _, path := range []string{r.zst(key), r.json(key)} {
			relative, _ := filepath.Rel(r.dir, path)
			want = append(want, relative)
		}
	}
	var found []string
	if err := filepath.WalkDir(r.dir, func(path string, entry fs.DirEntry, err error) error {
		relative, _ := filepath.Rel(r.dir, path)
		if err != nil || entry.IsDir() {
			return err
		}
		if !strings.HasPrefix(relative, ".polykit-cache/") {
			found = append(found, relative)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	slices.Sort(want)
	slices.Sort(found)
	if !slices.Equal(found, want) {
		t.Errorf("in the directory: %q, want %q", found, want)
	}
	if err := agrees(r.address, r.dir); err != nil {
		t.Error(err)
	}
}
