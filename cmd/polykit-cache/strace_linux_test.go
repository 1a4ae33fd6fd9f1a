package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// This file lets strace(1) look at the syscalls of a server, and make a chosen one of them fail.
//
// strace counts the calls of each thread for itself, and Go moves a request from thread to thread, so
// "the third openat" can't be said to it. Instead the server is stopped (SIGSTOP) behind each call that
// must go well; then strace is attached anew, for the next call only.

func init() { commands["polykit-cache-held"] = held }

// held is the server, but does not begin before the end of its standard input. It closes its descriptor 3 when
// all that a server does by itself at its start is done.
func held() {
	const setPtracer, any = 0x59616d61, ^uintptr(0)
	syscall.RawSyscall(syscall.SYS_PRCTL, setPtracer, any, 0) // or else strace would have to be its parent, where Yama is
	io.Copy(io.Discard, os.Stdin)
	go func() {
		for !settled() {
			time.Sleep(time.Millisecond)
		}
		os.NewFile(3, "settled").Close()
	}()
	main()
}

// atRest match the goroutines that work in the background, when they wait for something to do.
var atRest = []*regexp.Regexp{
	regexp.MustCompile(`(?m)^goroutine \d+ \[select[^]]*\]:\n\S*/index\.\(\*Index\)\.Run\(`),
	regexp.MustCompile(`(?m)^goroutine \d+ \[select[^]]*\]:\n\S*/index\.\(\*Index\)\.reconcileWhenLost\(`),
	regexp.MustCompile(`(?m)^goroutine \d+ \[select[^]]*\]:\n\S*/retention\.\(\*Collector\)\.Run\(`),
}

// settled says whether the server that this process is has nothing to do by itself: the index is reconciled,
// and the collector has measured the directory, which it does again every minute.
func settled() bool {
	stacks := make([]byte, 1<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	for _, expression := range atRest {
		if !expression.Match(stacks) {
			return false
		}
	}
	return true
}

// traced is a server in a process of its own, at whose syscalls strace looks.
type traced struct {
	cmd     *exec.Cmd
	hold    io.Closer
	stdout  io.Reader
	stderr  strings.Builder
	settled *os.File // ends when the server has nothing to do by itself
	address string   // "" until it listens
	log     <-chan string
	began   time.Time
	ended   string // how
}

// hold starts a server that does not begin yet. Without flags it uses all of the disk, however full that is.
func hold(t *testing.T, dir string, flags ...string) *traced {
	t.Helper()
	if len(flags) == 0 {
		flags = []string{"--min-free=0"}
	}
	p := &traced{cmd: exec.Command("polykit-cache-held", append([]string{"--port=0", "--scrub-interval=0", "--storage-dir", dir}, flags...)...)}
	// A set number of processors keeps the runtime from reading anew every second how many there are.
	p.cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0", "GOMAXPROCS=2")
	p.cmd.Dir = "/" // or else the traces name it
	p.cmd.Stderr = &p.stderr
	var err error
	if p.hold, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if p.stdout, err = p.cmd.StdoutPipe(); err != nil {
		t.Fatal(err)
	}
	settled, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p.settled, p.cmd.ExtraFiles = settled, []*os.File{write}
	err = p.cmd.Start()
	write.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.settled.Close()
		if p.ended == "" {
			p.cmd.Process.Kill()
			p.wait()
		}
	})
	return p
}

// begin lets the server begin, and returns "listening" or how it ended.
func (p *traced) begin() string {
	p.began = time.Now()
	p.hold.Close()
	if p.address, p.log = readAddress(p.stdout); p.address == "" {
		return p.wait()
	}
	return "listening"
}

// settle waits until the server has nothing to do by itself.
func (p *traced) settle() { io.Copy(io.Discard, p.settled) }

// start starts a server that has nothing to do by itself.
func start(t *testing.T, dir string, flags ...string) *traced {
	t.Helper()
	p := hold(t, dir, flags...)
	if outcome := p.begin(); outcome != "listening" {
		t.Fatalf("the server does not listen: %s, %s", outcome, &p.stderr)
	}
	p.settle()
	return p
}

// wait waits for the end of the server and returns how it ended.
func (p *traced) wait() string {
	if p.ended != "" {
		return p.ended
	}
	if p.log != nil {
		<-p.log
	}
	p.cmd.Wait()
	p.ended = fmt.Sprint("exit ", p.cmd.ProcessState.ExitCode())
	if status := p.cmd.ProcessState.Sys().(syscall.WaitStatus); status.Signaled() {
		p.ended = status.Signal().String()
	}
	return p.ended
}

// stop ends the server in good order.
func (p *traced) stop() string {
	p.cmd.Process.Signal(syscall.SIGTERM)
	return p.wait()
}

// goOn lets the server go on after it was stopped.
func (p *traced) goOn() { p.cmd.Process.Signal(syscall.SIGCONT) }

// openBelow returns which files in a storage directory, or itself, the server has open, but for the index's.
func (p *traced) openBelow(t *testing.T, dir string) []string {
	t.Helper()
	fds := fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid)
	entries, err := os.ReadDir(fds)
	if err != nil {
		t.Fatal(err)
	}
	var open []string
	for _, entry := range entries {
		if target, err := os.Readlink(filepath.Join(fds, entry.Name())); err == nil && strings.HasPrefix(target+"/", dir+"/") && !strings.HasPrefix(target, dir+"/"+indexFiles) {
			open = append(open, target)
		}
	}
	return open
}

// call is a syscall on a file.
type call struct {
	name string // of the syscall
	path string // of the last file that it names, as names calls it
}

func (c call) String() string { return c.name + " " + c.path }

// indexFiles is how the names of the index's files begin, relative to the storage directory.
const indexFiles = ".polykit-cache/index.db"

// names gives the files of a storage directory names that are the same for every key.
type names struct {
	root   string            // files elsewhere are not looked at
	dir    string            // the storage directory
	key    artifact.Key      // the zero Key for all keys, whose files have their own names then
	unique map[string]string // names of files that have random ones
	real   map[string]string // the opposite
}

func newNames(root, dir string, key artifact.Key) *names {
	return &names{root: root, dir: dir, key: key, unique: map[string]string{}, real: map[string]string{}}
}

var inShard = regexp.MustCompile(`^([0-9a-f]{2})(?:/|$)`)

// about says whether a call is about a request for the key. The index, which is a database, makes its calls in
// the background, and looks at other keys there that were missed before.
func (n *names) about(name, path string) bool {
	relative, err := filepath.Rel(n.dir, path)
	if err != nil || strings.HasPrefix(relative, indexFiles) {
		return false
	}
	if relative == ".polykit-cache" {
		switch name {
		case "open", "openat", "fsync", "close": // SQLite syncs the directory of its files
			return false
		}
	}
	outer := inShard.FindStringSubmatch(relative)
	return n.key == artifact.Key{} || outer == nil || outer[1] == n.key.String()[:2]
}

// name returns the name of a path.
func (n *names) name(path string) string {
	relative, err := filepath.Rel(n.dir, strings.TrimSuffix(path, " (deleted)"))
	if err != nil {
		return path
	}
	extension := filepath.Ext(relative)
	stem := strings.TrimSuffix(relative, extension)
	switch folder := filepath.Dir(relative); folder {
	case "tmp", ".polykit-cache/quarantine":
		if n.unique[stem] == "" {
			n.unique[stem] = fmt.Sprintf("%s/%d", folder, len(n.unique)+1)
		}
		name := n.unique[stem]
		if folder != "tmp" {
			name += extension
		}
		n.real[name] = path
		return name
	}
	if n.key == (artifact.Key{}) {
		return relative
	}
	digits := n.key.String()
	relative = strings.Replace(relative, digits+".", "KEY.", 1)
	switch {
	case strings.HasPrefix(relative, digits[:2]+"/"+digits[2:4]):
		relative = "aa/bb" + relative[5:]
	case relative == digits[:2]:
		relative = "aa"
	}
	return relative
}

// path returns the path of a name, or "" if it has not come up yet.
func (n *names) path(name string) string {
	if isUnique(name) {
		return n.real[name]
	}
	digits := n.key.String()
	if rest, ok := strings.CutPrefix(name, "aa/bb"); ok {
		name = digits[:2] + "/" + digits[2:4] + strings.Replace(rest, "KEY.", digits+".", 1)
	} else if name == "aa" {
		name = digits[:2]
	}
	return filepath.Join(n.dir, name)
}

func isUnique(name string) bool {
	return strings.HasPrefix(name, "tmp/") || strings.HasPrefix(name, ".polykit-cache/quarantine/")
}

// event is what a line of strace says.
type event struct {
	call
	line     string
	from     string // the first file that it names
	begins   bool   // the call does
	result   string // of the call, where it ends
	injected bool   // the result is
	stops    bool   // the server does, behind a call
	listens  bool   // the server does, which is the end of its start
}

var (
	listenLine  = regexp.MustCompile(`^\d+ +listen\(`)
	callLine    = regexp.MustCompile(`^(\d+) +(\w+)\((.*)$`)
	stopLine    = regexp.MustCompile(`^(\d+) +--- (SIGSTOP|stopped by SIGSTOP) `)
	resumedLine = regexp.MustCompile(`^(\d+) +<\.\.\. \w+ resumed>(.*)$`)
)

// fileCalls are the calls that are made on files, some of them on sockets too. fcntl is not among
// them: Go makes it for each file that it opens, and does without it.
const fileCalls = "openat,read,?readv,pread64,write,?writev,pwrite64,close,fsync,fdatasync,sync_file_range,linkat,unlinkat,renameat,renameat2," +
	"mkdirat,newfstatat,fstat,statx,lseek,ftruncate,fallocate,utimensat,getdents64,statfs,fstatfs,flock,sendfile,copy_file_range,splice"

// pathCalls are those that are never made on sockets, so all of them can fail.
const pathCalls = "openat,fsync,linkat,unlinkat,renameat,mkdirat,newfstatat,utimensat,statfs,getdents64,flock"

// tracer is a strace at work.
type tracer struct {
	cmd     *exec.Cmd
	lines   chan string
	names   *names
	below   *regexp.Regexp
	pending map[string]event // calls that have begun, by thread
	stopped map[string]bool  // threads that were told to stop, but have not yet
}

// trace attaches strace to a server, with more options, and returns when it sees every call.
func trace(t *testing.T, p *traced, n *names, options ...string) *tracer {
	t.Helper()
	path, err := exec.LookPath("strace")
	if err != nil {
		skip(t, "no strace: %v", err)
	}
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	tr := &tracer{
		cmd:     exec.Command(path, append([]string{"-f", "-y", "-s0", "-o/dev/fd/3", "-p", strconv.Itoa(p.cmd.Process.Pid)}, options...)...),
		lines:   make(chan string),
		names:   n,
		below:   regexp.MustCompile(`["<](` + regexp.QuoteMeta(n.root) + `(?:/[^">]*)?)[">]`),
		pending: map[string]event{},
		stopped: map[string]bool{},
	}
	tr.cmd.ExtraFiles = []*os.File{write}
	stderr, err := tr.cmd.StderrPipe()
	if err == nil {
		err = tr.cmd.Start()
	}
	write.Close()
	if err != nil {
		t.Fatal(err)
	}
	messages := bufio.NewScanner(stderr)
	if !messages.Scan() || !strings.Contains(messages.Text(), " attached") {
		tr.cmd.Process.Kill()
		tr.cmd.Wait()
		if strings.Contains(messages.Text(), "not permitted") {
			skip(t, "strace may not attach to the server: %s", messages.Text())
		}
		t.Fatalf("strace does not attach to the server: %s", messages.Text())
	}
	go func() {
		for messages.Scan() { // those about other threads
		}
	}()
	go func() {
		defer close(tr.lines)
		defer read.Close()
		for lines := bufio.NewScanner(read); lines.Scan(); {
			tr.lines <- lines.Text()
		}
	}()
	return tr
}

// parse returns what a line says about a file below the root of the names, or a stop.
func (tr *tracer) parse(line string) event {
	e := event{line: line, injected: strings.HasSuffix(line, "(INJECTED)"), listens: listenLine.MatchString(line)}
	if m := callLine.FindStringSubmatch(line); m != nil {
		paths := tr.below.FindAllStringSubmatch(m[3], -1)
		if paths != nil && tr.names.about(m[2], paths[len(paths)-1][1]) {
			e.from = tr.names.name(paths[0][1])
			e.call, e.begins = call{m[2], tr.names.name(paths[len(paths)-1][1])}, true
			if strings.HasSuffix(line, "<unfinished ...>") {
				tr.pending[m[1]] = e
				return e
			}
		}
	} else if m := resumedLine.FindStringSubmatch(line); m != nil {
		e.call, e.from = tr.pending[m[1]].call, tr.pending[m[1]].from
		delete(tr.pending, m[1])
	} else if m := stopLine.FindStringSubmatch(line); m != nil {
		// Every thread stops after the one that was told to. Before that one has, strace must not detach.
		e.stops = m[2] != "SIGSTOP" && tr.stopped[m[1]]
		tr.stopped[m[1]] = m[2] == "SIGSTOP"
	}
	if end := strings.LastIndex(line, " = "); e.call != (call{}) && end >= 0 {
		e.result = line[end+len(" = "):]
	}
	return e
}

// detach ends strace. The server goes on, or stays stopped. It returns what strace had still to say.
func (tr *tracer) detach() []event {
	tr.cmd.Process.Signal(syscall.SIGTERM)
	return tr.rest()
}

// rest returns what strace says until it ends.
func (tr *tracer) rest() []event {
	var events []event
	for line := range tr.lines {
		if e := tr.parse(line); e.call != (call{}) || e.listens {
			events = append(events, e)
		}
	}
	tr.cmd.Wait()
	return events
}

// watch returns the outcome of a request and what the server did on files meanwhile, or until it listened.
func watch(t *testing.T, p *traced, n *names, request func() string) (string, []event) {
	t.Helper()
	tr := trace(t, p, n, "-e", "trace=listen,"+fileCalls)
	answer := make(chan string, 1)
	go func() { answer <- request() }()
	var events []event
	for {
		select {
		case line := <-tr.lines:
			if e := tr.parse(line); e.call != (call{}) || e.listens {
				events = append(events, e)
			}
		case outcome := <-answer:
			events = append(events, tr.detach()...)
			if end := slices.IndexFunc(events, func(e event) bool { return e.listens }); end >= 0 {
				events = events[:end]
			}
			return outcome, events
		}
	}
}

// inject lets the call calls[i] of a request, which makes them in this order, meet a fault, and returns
// the outcome, and an error if the call did not meet it. It fails the test if the request ended without
// this call. The fault is
//
//	ENOSPC …	for the call to fail
//	ENOSPC+ …	for the call and all later ones to fail, as far as they are among pathCalls
//	short	for a write of one byte only that says so, but does nothing
//	none	for a result of 0 that does nothing
//	kill	for the server to be killed before the call
func inject(t *testing.T, p *traced, n *names, calls []call, i int, fault string, request func() string) (outcome string, missed error) {
	t.Helper()
	target, earlier := calls[i], calls[:i]
	answer := make(chan string, 1)
	begin := func() { go func() { answer <- request() }() }

	everything := strings.HasSuffix(fault, "+")
	// strace can tell the call from others by its path; but not if it is the first on a path that has
	// something random.
	first := slices.IndexFunc(earlier, func(c call) bool { return c.path == target.path })
	byPath := n.path(target.path) != "" || first >= 0
	// The calls alike must pass first, and the path be known.
	alike := func(c call) bool { return c.name == target.name && (!byPath || c.path == target.path) }
	kinds := target.name
	if first >= 0 {
		kinds += "," + earlier[first].name // which tells the path
	}
	if everything && i > 0 { // all must pass: up to the one before, or the first of those if it is repeated
		for i--; i > 0 && calls[i-1] == calls[i]; i-- {
		}
		last := calls[i]
		earlier = calls[:i+1]
		alike = func(c call) bool { return c == last }
		kinds = last.name + "," + calls[slices.IndexFunc(calls, func(c call) bool { return c.path == last.path })].name
	}
	toPass := 0
	for _, c := range earlier {
		if alike(c) {
			toPass++
		}
	}
	reached := func() bool { return toPass == 0 && (everything || !byPath || n.path(target.path) != "") }

	resume := begin
	if !reached() {
		resume = p.goOn
		tr := trace(t, p, n, "-e", "trace="+kinds, "-e", "inject="+kinds+":signal=SIGSTOP")
		begin()
		for stopped := false; !stopped; {
			select {
			case line := <-tr.lines:
				e := tr.parse(line)
				if e.begins && alike(e.call) {
					toPass--
				}
				if e.stops {
					if stopped = reached(); !stopped {
						p.goOn()
					}
				}
			case outcome := <-answer:
				tr.detach()
				t.Fatalf("there was no call to fail, and the outcome is %s", outcome)
			}
		}
		tr.detach()
	}

	kind, how, once := target.name, "error="+fault, ":signal=SIGSTOP:when=1"
	switch {
	case fault == "short":
		how = "retval=1"
	case fault == "none":
		how = "retval=0"
	case fault == "kill":
		how, once = "signal=SIGKILL", ""
	case everything:
		kind, how, once, byPath = pathCalls, strings.TrimSuffix(how, "+"), "", false
	}
	options := []string{"-e", "trace=" + kind, "-e", "inject=" + kind + ":" + how + once}
	if byPath {
		options = append(options, "-P", n.path(target.path))
	}
	tr := trace(t, p, n, options...)
	resume()
	var happened []event
	for outcome == "" {
		select {
		case line, ok := <-tr.lines:
			if !ok { // the server was killed
				tr.cmd.Wait()
				outcome, tr = <-answer, nil
				break
			}
			e := tr.parse(line)
			happened = append(happened, e)
			if e.stops {
				happened = append(happened, tr.detach()...)
				p.goOn()
				outcome, tr = <-answer, nil
			}
		case outcome = <-answer:
		}
	}
	switch {
	case tr == nil:
	case fault == "kill": // while the server's threads die strace must not be told to end, or it waits for ever
		tr.rest()
	default:
		happened = append(happened, tr.detach()...)
	}
	injected := []string{}
	for _, e := range happened {
		if e.injected {
			injected = append(injected, e.call.String())
		}
	}
	switch {
	case fault == "kill":
		if ended := p.wait(); ended != "killed" {
			t.Errorf("the server that was to be killed ended with %s", ended)
		}
	case everything:
		if len(injected) == 0 {
			missed = errors.New("nothing failed")
		}
	case !slices.Equal(injected, []string{target.String()}):
		var lines strings.Builder
		for _, e := range happened {
			fmt.Fprintln(&lines, e.line)
		}
		missed = fmt.Errorf("what failed is %q, want %s; strace says\n%s", injected, target, &lines)
	}
	return outcome, missed
}
