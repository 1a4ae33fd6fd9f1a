package main

import (
	"net/http"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// indexCalls are the calls that SQLite makes on its files, but for close, which would leave them open, and fcntl,
// whose failure it takes for a lock of somebody else, for which it waits 10 seconds.
const indexCalls = "?open,openat,?stat,?lstat,newfstatat,fstat,?access,faccessat,read,pread64,write,pwrite64,fsync,fdatasync," +
	"ftruncate,fallocate,?unlink,unlinkat,mmap"

// failIndex lets every call of a server on the index's files fail, and returns what ends that. Some must fail
// until then.
func failIndex(t *testing.T, r *faultRig, errno string) (end func()) {
	t.Helper()
	options := []string{"-e", "trace=" + indexCalls, "-e", "inject=" + indexCalls + ":error=" + errno}
	for _, suffix := range []string{"", "-journal", "-wal", "-shm"} {
		options = append(options, "-P", r.path(indexFiles+suffix))
	}
	tr := trace(t, r.traced, newNames(r.root, r.dir, r.keys[0]), options...)
	failed := make(chan int)
	go func() {
		n := 0
		for line := range tr.lines {
			if strings.HasSuffix(line, "(INJECTED)") {
				n++
			}
		}
		failed <- n
	}()
	return func() {
		tr.cmd.Process.Signal(syscall.SIGTERM)
		if n := <-failed; n == 0 {
			t.Error("no call of the index failed")
		}
		tr.cmd.Wait()
	}
}

// works makes every request that needs no index.
func (r *faultRig) works(t *testing.T) {
	t.Helper()
	for _, puts := range puts {
		for name, put := range puts {
			key := r.newKey(t)
			is(t, "GET before the upload", r.get(key), "404")
			is(t, name, put(r, key), "201")
			is(t, name+" once more", put(r, key), "409")
			is(t, "GET", r.get(key), "200")
			is(t, "HEAD", r.head(key), "200")
			is(t, "GET of the files", r.files(key), "200")
		}
	}
	gone := r.newKey(t)
	is(t, "PUT", r.put(gone), "201")
	is(t, "DELETE", r.request(http.MethodDelete, "/v1/artifacts/"+gone.String(), 0, nil, nil), "200")
	is(t, "GET of what was deleted", r.get(gone), "404")
	r.forget(gone)
	is(t, "PUT of a pin", r.request(http.MethodPut, "/v1/artifacts/"+r.keys[0].String()+"/pin", 0, nil, nil), "200")
	is(t, "GET /readyz", r.ready(gone), "200")
}

// TestIndexFaults makes every call on the index's files fail, from the start on or later. Nobody who stores or
// serves is the worse for it, and when the fault is gone the index becomes complete by itself.
func TestIndexFaults(t *testing.T) {
	for _, errno := range []string{"EIO", "ENOSPC", "EACCES", "EROFS", "EMFILE"} {
		for _, when := range []string{"from the start on", "later"} {
			t.Run(errno+" "+when, func(t *testing.T) {
				t.Parallel()
				root := t.TempDir()
				r := &faultRig{root: root, dir: filepath.Join(root, "store"), data: several}
				before := r.newKey(t)
				r.traced = start(t, r.dir)
				is(t, "PUT before the fault", r.put(before), "201")
				if when != "later" {
					is(t, "the end before the fault", r.stop(), "exit 0")
					r.traced = hold(t, r.dir)
				}
				end := failIndex(t, r, errno)
				if when != "later" {
					is(t, "the start with the fault", r.begin(), "listening")
					is(t, "GET /v1/stats", r.request(http.MethodGet, "/v1/stats", 0, nil, nil), "503")
					is(t, "GET /v1/artifacts", r.request(http.MethodGet, "/v1/artifacts", 0, nil, nil), "503")
				}
				r.works(t)
				is(t, "GET /v1/stats behind that", r.request(http.MethodGet, "/v1/stats", 0, nil, nil), "200", "503") // which writes what is pending
				end()
				if err := agrees(r.address, r.dir); err != nil {
					t.Errorf("when the fault is gone: %v", err)
				}
				r.works(t)
				if err := agrees(r.address, r.dir); err != nil {
					t.Errorf("then: %v", err)
				}
				is(t, "the end", r.stop(), "exit 0")
				r.traced = start(t, r.dir)
				r.audit(t)
				is(t, "the end", r.stop(), "exit 0")
			})
		}
	}
}

// TestIndexFaultAtEnd lets a server end whose index can't be written: it ends in good order all the same, and the
// next one knows that its index may not be complete.
func TestIndexFaultAtEnd(t *testing.T) {
	root := t.TempDir()
	r := &faultRig{root: root, dir: filepath.Join(root, "store"), data: several}
	r.traced = start(t, r.dir)
	is(t, "PUT", r.put(r.newKey(t)), "201")
	end := failIndex(t, r, "EIO")
	r.works(t)
	is(t, "the end", r.stop(), "exit 0")
	end()
	r.traced = start(t, r.dir)
	r.audit(t)
	is(t, "the end", r.stop(), "exit 0")
}
