package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	mathrand "math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/cachetest"
)

const (
	// fillVariable is how many artifacts are uploaded, instead of fillArtifacts.
	fillVariable  = "POLYKIT_CACHE_TEST_FILL"
	fillArtifacts = 2000

	fillUploaders, fillDownloaders = 6, 2
	fillTasks                      = 7
	fillPinned                     = 5
	// fillEach is for how many bytes an artifact there is room: half of what one takes on average.
	fillEach = 10 << 10
	// fillLarge is the least size of a large artifact, of which there is one among fillEvery.
	fillLarge = 200_000
	fillEvery = 50
	// fillHidden is what a server that was killed may not know in spite of what it says that everything takes: its
	// index counts for 2 MiB more than it takes, and directories that are made while it measures do not count at once.
	fillHidden = 3 * mebi
)

// TestFill uploads far more than --max-storage, mostly small artifacts, from several clients beside downloads, and
// kills the server in the middle. What it says of what it stores is then compared with the directory, artifact by
// artifact, and artifacts are listed and deleted by filters. The directory never takes more than the limit, but
// for what a server that was killed had not told its index, until that is complete. "make fill" uploads 100,000.
func TestFill(t *testing.T) {
	n := int(fromEnvironment(t, fillVariable, fillArtifacts))
	f := &fill{dir: t.TempDir(), n: n, limit: int64(n)*fillEach + 4*mebi, rests: map[bool][][]byte{}, statuses: map[int]int{}}
	for i := range 8 {
		size := fillLarge + i*70_000
		f.rests[true] = append(f.rests[true], cachetest.Rest(map[string]string{"large.bin": string(randomBytes(uint64(i), size))}))
		f.rests[false] = append(f.rests[false], cachetest.Rest(map[string]string{"small.txt": strings.Repeat(fmt.Sprint(i), 10)}))
	}
	watched := f.watch(t)

	f.start(t)
	for i := range fillPinned {
		f.upload(t, f.ways[i%len(f.ways)], i)
		if err := askJSON(f.server.address, http.MethodPut, "/v1/artifacts/"+fillKey(i).String()+"/pin", nil, &cachev1.PinArtifactResponse{}); err != nil {
			t.Fatal(err)
		}
	}
	f.next.Store(fillPinned)
	f.use(t, n/4*3, func() {
		f.ending.Store(true)
		f.server.Process.Kill()
		<-f.server.ended
	})
	f.close()

	f.start(t)
	stats, err := statistics(f.server.address)
	if err != nil {
		t.Fatal(err)
	}
	f.unknown.Store(max(0, diskUsage(f.dir)-stats.GetStorage().GetUsedSize()) + fillHidden)
	before := f.statuses[http.StatusCreated]
	f.use(t, n, func() {})
	f.settles(t)
	f.compareStats(t, int64(f.statuses[http.StatusCreated]-before))
	f.compareContent(t)
	f.list(t)
	f.delete(t)
	watched()
	for i := range fillPinned {
		if status := f.download(t, f.ways[0], i); status != http.StatusOK {
			t.Errorf("what was pinned is %d", status)
		}
	}
	f.stop(t)

	f.start(t)
	if stats, err := statistics(f.server.address); err != nil || !stats.GetIndexComplete() {
		t.Errorf("after an end in good order statistics are %v, %v", stats, err)
	}
	if err := agrees(f.server.address, f.dir); err != nil {
		t.Error(err)
	}
	f.stop(t)
	t.Logf("uploads: %v, limit: %d", f.statuses, f.limit)
}

// fill is a directory that is filled, and the server on it.
type fill struct {
	dir   string
	n     int
	limit int64
	rests map[bool][][]byte // of artifacts behind their metadata, by whether they are large

	server *process
	ways   []way
	next   atomic.Int64 // the number of the next artifact
	ending atomic.Bool  // from here on connections may break

	started, ended atomic.Int64 // bytes on the disk that uploads may take which have begun, or ended
	unknown        atomic.Int64 // bytes on the disk that the server does not know of yet

	mu       sync.Mutex
	statuses map[int]int // of uploads
}

func (f *fill) start(t *testing.T) {
	t.Helper()
	f.ending.Store(false)
	f.server = startProgram(t, "polykit-cache", f.dir, fmt.Sprint("--max-storage=", f.limit), "--min-free=0", "--durability=none")
	f.ways = newWays(f.server.address)
}

func (f *fill) close() {
	for _, way := range f.ways {
		way.close()
	}
}

// stop ends the server in good order.
func (f *fill) stop(t *testing.T) {
	t.Helper()
	f.close()
	if err := f.server.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if log := f.server.ends(t); strings.Contains(log, "level=ERROR") {
		t.Errorf("the server logged an error:\n%s", log)
	}
}

func randomBytes(seed uint64, size int) []byte {
	content := make([]byte, size)
	mathrand.NewChaCha8(sha256.Sum256(fmt.Append(nil, seed))).Read(content)
	return content
}

func fillKey(i int) artifact.Key { return cachetest.Key(fmt.Sprint("fill ", i)) }

func task(i int) string { return fmt.Sprint("task", i%fillTasks) }

func isLarge(i int) bool { return i%fillEvery == fillEvery-1 }

// artifact returns the artifact of a number.
func (f *fill) artifact(i int) []byte {
	metadata := cachetest.File("metadata.json", fmt.Sprintf(`{"package_name":"fill","task_name":%q,"command":"true","cache_key_hash":"%s","created_at":1700000000,"version":1}`,
		task(i), fillKey(i)))
	rests := f.rests[isLarge(i)]
	return slices.Concat(cachetest.Store(metadata), rests[i/fillEvery%len(rests)])
}

// upload uploads an artifact, which must be stored unless the server may be dead.
func (f *fill) upload(t *testing.T, way way, i int) {
	data := f.artifact(i)
	taken := int64(len(data)) + 32<<10 // with its last block, its memo, and directories
	f.started.Add(taken)
	defer f.ended.Add(taken)
	status, err := way.put(fillKey(i), int64(len(data)), bytes.NewReader(data))
	if status != http.StatusCreated && !f.ending.Load() {
		t.Errorf("the upload of artifact %d was answered with %d, %v", i, status, err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.statuses[status]++
}

// download downloads an artifact, which must be whole or a miss, and returns the status.
func (f *fill) download(t *testing.T, way way, i int) int {
	var got bytes.Buffer
	_, status, err := way.get(fillKey(i), &got)
	switch {
	case f.ending.Load() && err != nil:
	case err != nil || status != http.StatusOK && status != http.StatusNotFound:
		t.Errorf("the download of artifact %d was answered with %d, %v", i, status, err)
	case status == http.StatusOK && !bytes.Equal(got.Bytes(), f.artifact(i)):
		t.Errorf("the download of artifact %d had %d bytes, which are not it", i, got.Len())
	}
	return status
}

// use uploads artifacts up to a number from several clients, and downloads beside that. Then it ends what they
// do with end.
func (f *fill) use(t *testing.T, until int, end func()) {
	var uploading, downloading sync.WaitGroup
	reached, done := make(chan struct{}), make(chan struct{})
	var once sync.Once
	for range fillUploaders {
		uploading.Go(func() {
			for !f.ending.Load() {
				i := int(f.next.Add(1) - 1)
				if i >= until {
					once.Do(func() { close(reached) })
					if until == f.n {
						return
					}
				}
				f.upload(t, f.ways[i%len(f.ways)], i)
			}
		})
	}
	for seed := range fillDownloaders {
		random := randomOf(uint64(seed), 0)
		downloading.Go(func() {
			for !f.ending.Load() {
				select {
				case <-done:
					return
				default:
				}
				f.download(t, f.ways[random.IntN(len(f.ways))], random.IntN(int(f.next.Load())))
			}
		})
	}
	<-reached
	end()
	uploading.Wait()
	close(done)
	downloading.Wait()
}

// watch looks at how much the directory takes, until what it returns is called. While it looks, what is added
// and what is removed may both count, so that much is allowed on top.
func (f *fill) watch(t *testing.T) (end func()) {
	done := make(chan struct{})
	var watching sync.WaitGroup
	var most, looks int64
	watching.Go(func() {
		for {
			ended := f.ended.Load()
			unknown := f.unknown.Load()
			size := diskUsage(f.dir) - (f.started.Load() - ended) - unknown
			most = max(most, size)
			looks++
			select {
			case <-done:
				return
			default:
			}
		}
	})
	return func() {
		close(done)
		watching.Wait()
		if most > f.limit || most < f.limit/5*4 {
			t.Errorf("the directory took %d bytes at most, and the limit is %d", most, f.limit)
		}
		if looks < 10 {
			t.Errorf("the directory was looked at only %d times", looks)
		}
	}
}

// settles waits until the index is complete and what is too much evicted, if nobody uploads any more: at most for
// the minute after which the collector looks by itself. From here on the limit is strict.
func (f *fill) settles(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(10 * time.Millisecond) {
		err := agrees(f.server.address, f.dir)
		stats, statsErr := statistics(f.server.address)
		if err = errors.Join(err, statsErr); err == nil && stats.GetStorage().GetUsedSize() <= f.limit {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the server does not come to rest: %v, %v", stats.GetStorage(), err)
		}
	}
	t.Logf("%d bytes might not be known after the kill", f.unknown.Swap(0))
}

// compareStats compares the statistics with the directory, and with what clients know: stored is how many
// uploads the server has answered with 201.
func (f *fill) compareStats(t *testing.T, stored int64) {
	t.Helper()
	stats, err := statistics(f.server.address)
	if err != nil {
		t.Fatal(err)
	}
	used, taken := stats.GetStorage().GetUsedSize(), diskUsage(f.dir)
	// The index counts for more than it takes: for what its log may grow to.
	if used < taken || used > taken+4*mebi {
		t.Errorf("the directory takes %d bytes, but is said to take %d", taken, used)
	}
	if used > f.limit || stats.GetStorage().GetMaxStorageSize() != f.limit {
		t.Errorf("the storage is %v; the limit is %d", stats.GetStorage(), f.limit)
	}
	if since := stats.GetSinceStart(); since.GetStoredCount() != stored || since.GetEvictedCount() == 0 || since.GetHitCount() == 0 || since.GetMissCount() == 0 {
		t.Errorf("since the start %d artifacts were stored, and statistics are %v", stored, since)
	}
	sums, tasks := &cachev1.CacheStats{}, 0
	for _, task := range stats.GetTasks() {
		if task.GetPackageName() == "fill" { // and not one of which only the file is known, since the kill came before its memo
			tasks++
		}
		sums.ArtifactCount += task.GetStats().GetArtifactCount()
		sums.Size += task.GetStats().GetSize()
		sums.DiskSize += task.GetStats().GetDiskSize()
	}
	if tasks != fillTasks {
		t.Errorf("there are %d tasks, and statistics are of %d", fillTasks, tasks)
	}
	if total := stats.GetTotal(); sums.ArtifactCount != total.GetArtifactCount() || sums.Size != total.GetSize() || sums.DiskSize != total.GetDiskSize() {
		t.Errorf("all tasks are %v, but the total is %v", sums, total)
	}
}

// numbers returns the numbers of the artifacts by their keys.
func (f *fill) numbers() map[artifact.Key]int {
	numbers := map[artifact.Key]int{}
	for i := range int(f.next.Load()) {
		numbers[fillKey(i)] = i
	}
	return numbers
}

// compareContent compares the files with what was uploaded: all sizes, and the bytes of some and of all of which the
// server does not know more than the file.
func (f *fill) compareContent(t *testing.T) {
	t.Helper()
	files, err := filesIn(f.dir)
	if err != nil {
		t.Fatal(err)
	}
	known, err := listed(overREST(f.server.address, "page_size=1000&order_by=ARTIFACT_ORDER_CACHE_KEY&descending=true"))
	if err != nil {
		t.Fatal(err)
	}
	numbers := f.numbers()
	looked := 0
	for key, file := range files {
		i, uploaded := numbers[key]
		if !uploaded || file.size != int64(len(f.artifact(i))) {
			t.Errorf("%s has %d bytes, which nobody uploaded", key, file.size)
			continue
		}
		if looked++; looked <= 500 || known[key].GetArtifact().GetHash() == "" {
			if status := f.download(t, f.ways[looked%len(f.ways)], i); status != http.StatusOK {
				t.Errorf("the download of what is stored was answered with %d", status)
			}
		}
	}
	for i := range fillPinned {
		if _, stored := files[fillKey(i)]; !stored {
			t.Errorf("artifact %d was pinned, and is gone", i)
		}
	}
}

// list lists by filters, over both protocols.
func (f *fill) list(t *testing.T) {
	t.Helper()
	if _, err := statistics(f.server.address); err != nil { // or last uses would be written while they order the pages
		t.Fatal(err)
	}
	service, closeConnection := f.service(t)
	defer closeConnection()
	files, err := filesIn(f.dir)
	if err != nil {
		t.Fatal(err)
	}
	numbers := f.numbers()
	largest := int64(fillLarge)
	pinned := true
	for name, filter := range map[string]struct {
		query   string
		filter  *cachev1.ArtifactFilter
		matches func(key artifact.Key, i int) bool
	}{
		"task":   {"filter.task_name=task3", &cachev1.ArtifactFilter{TaskName: "task3"}, func(_ artifact.Key, i int) bool { return task(i) == "task3" }},
		"large":  {fmt.Sprint("filter.min_size=", largest), &cachev1.ArtifactFilter{MinSize: largest}, func(_ artifact.Key, i int) bool { return isLarge(i) }},
		"small":  {fmt.Sprint("filter.max_size=", largest), &cachev1.ArtifactFilter{MaxSize: &largest}, func(_ artifact.Key, i int) bool { return !isLarge(i) }},
		"prefix": {"filter.key_prefix=A", &cachev1.ArtifactFilter{KeyPrefix: "A"}, func(key artifact.Key, _ int) bool { return strings.HasPrefix(key.String(), "a") }},
		"pinned": {"filter.pinned=true", &cachev1.ArtifactFilter{Pinned: &pinned}, func(_ artifact.Key, i int) bool { return i < fillPinned }},
	} {
		want := map[artifact.Key]bool{}
		for key := range files {
			if filter.matches(key, numbers[key]) {
				want[key] = true
			}
		}
		for protocol, page := range map[string]pages{
			"REST": overREST(f.server.address, filter.query+"&page_size=1000&order_by=ARTIFACT_ORDER_LAST_USED_AT"),
			"gRPC": overGRPC(service, &cachev1.ListArtifactsRequest{Filter: filter.filter, OrderBy: cachev1.ArtifactOrder_ARTIFACT_ORDER_SIZE, Descending: true}),
		} {
			found, err := listed(page)
			if err != nil {
				t.Errorf("%s over %s: %v", name, protocol, err)
			}
			for key := range found {
				if !want[key] {
					t.Errorf("%s over %s: %s is listed, but does not match", name, protocol, key)
				}
			}
			if len(found) != len(want) || len(want) == 0 {
				t.Errorf("%s over %s: %d are listed; want %d", name, protocol, len(found), len(want))
			}
		}
	}
}

// service returns the service over gRPC.
func (f *fill) service(t *testing.T) (service cachev1.ArtifactServiceClient, closeConnection func() error) {
	t.Helper()
	conn, err := grpc.NewClient(f.server.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	return cachev1.NewArtifactServiceClient(conn), conn.Close
}

// deletedTask is a task whose artifacts are deleted, but for those that are pinned.
const deletedTask = "task1"

// delete deletes by a filter: what matches and is not pinned is gone, and nothing else.
func (f *fill) delete(t *testing.T) {
	t.Helper()
	service, closeConnection := f.service(t)
	defer closeConnection()
	before, err := filesIn(f.dir)
	if err != nil {
		t.Fatal(err)
	}
	numbers := f.numbers()
	left, gone, goneSize := maps.Clone(before), int64(0), int64(0)
	for key, file := range before {
		if i := numbers[key]; task(i) == deletedTask && i >= fillPinned {
			delete(left, key)
			gone++
			goneSize += file.diskSize
		}
	}
	request := &cachev1.DeleteArtifactsRequest{Filter: &cachev1.ArtifactFilter{TaskName: deletedTask}, DryRun: true}
	planned, err := service.DeleteArtifacts(context.Background(), request)
	if err != nil {
		t.Fatal(err)
	}
	if count, size := removalsOf(planned); count != gone || size != goneSize {
		t.Errorf("to be deleted are %d artifacts that take %d bytes; want %d that take %d", count, size, gone, goneSize)
	}
	if after, err := filesIn(f.dir); err != nil || !maps.Equal(after, before) {
		t.Errorf("a dry run deleted something: %v", err)
	}
	request.DryRun = false
	var count, size int64
	for more := true; more; {
		answer := &cachev1.DeleteArtifactsResponse{}
		if err := askJSON(f.server.address, http.MethodPost, "/v1/artifacts:delete", request, answer); err != nil {
			t.Fatal(err)
		}
		n, taken := removalsOf(answer)
		count, size, more = count+n, size+taken, answer.GetMore()
	}
	if count != gone || size != goneSize {
		t.Errorf("deleted were %d artifacts that take %d bytes; want %d that take %d", count, size, gone, goneSize)
	}
	if after, err := filesIn(f.dir); err != nil || !maps.Equal(after, left) {
		t.Errorf("%d artifacts are left, %v; want %d", len(after), err, len(left))
	}
	if err := agrees(f.server.address, f.dir); err != nil {
		t.Error(err)
	}
}

// removalsOf sums up what was deleted.
func removalsOf(answer *cachev1.DeleteArtifactsResponse) (count, diskSize int64) {
	for _, removal := range answer.GetRemovals() {
		count += removal.GetArtifactCount()
		diskSize += removal.GetDiskSize()
	}
	return count, diskSize
}
