package server

import (
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// errTooSlow says that a client kept the server waiting for longer than it may.
var errTooSlow = errors.New("the client is too slow")

// pace bounds how long a client may keep the server waiting for bytes, or with bytes that it does not
// take. A client has a stock of time, at first all that it may have. Waiting for it takes from the
// stock, each byte adds what it may take at the least rate, and when nothing is left the client is
// given up. So a transfer of n bytes is waited for no longer than stock + n/rate in all, whatever its
// size is said to be, and no more than the stock at a time. What the server itself takes does not count.
//
// Only when the client is given up is a deadline set on a stream: deadlines of net/http's HTTP/2 strike
// whether or not anybody waits, so one that is set beforehand would punish a client for the time that the
// server takes. Those of a connection strike who waits, and cost less than a timer.
type pace struct {
	most   time.Duration         // of the stock
	rate   int64                 // bytes per second
	expire func(time.Time) error // sets the deadline
	// waits says that the deadline strikes only who waits, and so can be set beforehand. Who is given up
	// by it is not told why.
	waits bool
	// progress returns how many bytes came of a transfer before its end, if that can be known.
	progress func() int

	mu       sync.Mutex
	left     time.Duration
	began    time.Time // zero while nobody waits
	deadline time.Time // of who waits
	timer    *time.Timer
	fires    time.Time // zero if the timer is not set
	gaveUp   bool
	stopped  bool
}

func newPace(stall time.Duration, rate int64, expire func(time.Time) error) *pace {
	return &pace{most: stall, rate: rate, left: stall, expire: expire}
}

// worth returns the time that n bytes may take.
func (p *pace) worth(n int) time.Duration { return worth(n, p.rate) }

// worth returns the time that n bytes take at a rate in bytes per second.
func worth(n int, rate int64) time.Duration {
	return time.Duration(float64(n) / float64(rate) * float64(time.Second))
}

// begin says that the server now waits for a transfer of n bytes to end, or of as many as come if n
// is 0.
func (p *pace) begin(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.began = time.Now()
	p.deadline = p.began.Add(p.left + p.worth(n))
	switch early := p.deadline.Sub(p.fires); {
	case p.stopped:
	case p.waits:
		if p.fires.IsZero() || early < 0 || early > p.most/16 {
			p.fires = p.deadline
			p.expire(p.fires)
		}
	// Most transfers are over at once, so the timer of an earlier one is left as it is if it fires
	// soon enough.
	case p.fires.IsZero() || early < 0:
		p.arm()
	}
}

// end says that the transfer ended, with n bytes.
func (p *pace) end(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.left = min(p.most, p.left+p.worth(n)-time.Since(p.began))
	p.began = time.Time{}
}

// set says whether a deadline is set that leaves enough time for one more transfer.
func (p *pace) set() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.waits && time.Until(p.fires) > p.most/2
}

func (p *pace) arm() {
	p.fires = p.deadline
	if p.timer == nil {
		p.timer = time.AfterFunc(time.Until(p.fires), p.look)
	} else {
		p.timer.Reset(time.Until(p.fires))
	}
}

// look gives the client up if it is time to.
func (p *pace) look() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fires = time.Time{}
	switch {
	case p.began.IsZero() || p.stopped:
	case time.Now().Before(p.deadline):
		p.arm()
	case p.goesOn():
		p.arm()
	default:
		p.gaveUp = true
		p.expire(time.Unix(1, 0))
	}
}

// goesOn counts what came of a transfer that has not ended, and says whether it may be waited for.
func (p *pace) goesOn() bool {
	if p.progress == nil {
		return false
	}
	now := time.Now()
	p.left = min(p.most, p.left+p.worth(p.progress())-now.Sub(p.began))
	p.began, p.deadline = now, now.Add(p.left)
	return p.left > 0
}

// stop ends the pace. It returns an error that says so if the client was given up; it did not do what
// it should have.
func (p *pace) stop(should string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stopped = true
	if p.timer != nil {
		p.timer.Stop() // it would keep all that belongs to the request
	}
	if !p.gaveUp {
		return nil
	}
	return p.tooSlow(should)
}

// tooSlow returns the error of a client that was given up.
func (p *pace) tooSlow(should string) error {
	return fmt.Errorf("%w: it must %s something within %v, and %d bytes a second over time", errTooSlow, should, p.most, p.rate)
}

// pacedBody is the body of an upload, whose client must send it at the least rate.
type pacedBody struct {
	body  io.Reader
	pace  *pace
	first func() // is called before the first read, if it is not nil
}

func (b *pacedBody) Read(p []byte) (int, error) {
	if b.first != nil {
		b.first()
		b.first = nil
	}
	b.pace.begin(0)
	n, err := b.body.Read(p)
	b.pace.end(n)
	if err != nil {
		if slow := b.pace.stop("send"); slow != nil {
			err = slow
		}
	}
	return n, err
}

// pacedWriter is an answer whose client must take it at the least rate, and which is recorded.
type pacedWriter struct {
	http.ResponseWriter
	control *http.ResponseController
	pace    *pace
	conn    *greetedConn // of HTTP/1, else nil
	record  record       // of a request over REST
}

// Unwrap is for http.ResponseController.
func (w *pacedWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WriteHeader implements http.ResponseWriter.
func (w *pacedWriter) WriteHeader(status int) {
	w.answering(status)
	w.ResponseWriter.WriteHeader(status)
}

// answering says that the answer begins, with a status if it has none yet.
func (w *pacedWriter) answering(status int) {
	if w.record.status == 0 {
		w.record.status = status
		w.record.answering()
	}
}

func (w *pacedWriter) Write(p []byte) (int, error) {
	w.answering(http.StatusOK)
	w.pace.begin(len(p))
	n, err := w.write(p)
	w.pace.end(n)
	if w.record.request[0] != http.MethodHead { // whose answer net/http leaves the body out of
		w.record.sent += int64(n)
	}
	return n, err
}

const (
	// headerBuffer is less than what net/http has room for before it sends a header.
	headerBuffer = 2 << 10
	// togetherSize is the most bytes of a body that are sent together with the header.
	togetherSize = 16 << 10
)

// write sends the header and a whole small body at once, which net/http does in two parts if its buffer
// has not room for both. A part costs as much as all else that is done for a small artifact.
func (w *pacedWriter) write(p []byte) (n int, err error) {
	if w.conn == nil || len(p) < headerBuffer || len(p) > togetherSize || w.Header().Get("Content-Length") != strconv.Itoa(len(p)) {
		return w.ResponseWriter.Write(p)
	}
	w.conn.hold()
	n, err = w.ResponseWriter.Write(p)
	if err == nil {
		err = w.control.Flush()
	}
	if err = errors.Join(err, w.conn.release()); err != nil {
		n = 0
	}
	return n, err
}

// Flush is what gRPC asks of a ResponseWriter.
func (w *pacedWriter) Flush() { w.FlushError() }

// FlushError is what http.ResponseController asks of one.
func (w *pacedWriter) FlushError() error {
	w.pace.begin(0)
	defer w.pace.end(0)
	return w.control.Flush()
}

// sendSize is how much of a file is sent at a time.
const sendSize = 256 << 10

// ReadFrom lets net/http use sendfile(2), if r is a file or a part of one.
func (w *pacedWriter) ReadFrom(r io.Reader) (sent int64, err error) {
	w.answering(http.StatusOK)
	to, sends := w.ResponseWriter.(io.ReaderFrom)
	file := fileOf(r)
	if !sends || file == nil {
		return io.Copy(struct{ io.Writer }{w}, r)
	}
	left := int64(math.MaxInt64)
	if part, limited := r.(*io.LimitedReader); limited {
		left = part.N
	}
	for left > 0 {
		size := min(left, sendSize)
		w.pace.begin(int(size))
		n, err := to.ReadFrom(&io.LimitedReader{R: file, N: size})
		w.pace.end(int(n))
		w.record.sent += n
		sent += n
		left -= n
		if err != nil || n < size {
			return sent, err
		}
	}
	return sent, nil
}

// paceRequest bounds what the client of a request takes and what it sends, but for the bodies of
// uploads and calls, which have a pace of their own. The writer must be told when the request was handled.
func (s *Server) paceRequest(w http.ResponseWriter, r *http.Request) *pacedWriter {
	control := http.NewResponseController(w)
	if r.ProtoMajor == 1 && r.Body != http.NoBody {
		// A body that no handler reads net/http does, before it answers.
		control.SetReadDeadline(time.Now().Add(s.config.StallTimeout))
	}
	paced := &pacedWriter{ResponseWriter: w, control: control, pace: newPace(s.config.StallTimeout, s.config.MinDownloadRate, control.SetWriteDeadline)}
	if r.ProtoMajor == 1 {
		paced.pace.waits = true
		paced.pace.fires = time.Now().Add(s.config.StallTimeout) // limitedListener has set it
		paced.conn, _ = r.Context().Value(connKey{}).(*greetedConn)
	}
	return paced
}

// handled bounds the time for what net/http still has to send.
func (w *pacedWriter) handled(r *http.Request) {
	// A deadline of a stream that has ended net/http would keep, and the connection with it.
	if w.pace.stop("take") == nil && !isGRPC(r) && r.Context().Err() == nil && !w.pace.set() {
		w.control.SetWriteDeadline(time.Now().Add(w.pace.most))
	}
}

// paceBody returns the body of an upload, whose pace must be stopped.
func (s *Server) paceBody(w http.ResponseWriter, r *http.Request) *pacedBody {
	control := http.NewResponseController(w)
	control.SetReadDeadline(time.Time{}) // from here on the pace counts
	body := &pacedBody{body: r.Body, pace: newPace(s.config.StallTimeout, s.config.MinUploadRate, control.SetReadDeadline)}
	if r.ProtoMajor == 1 && r.Header.Get("Expect") != "" {
		// With the first read net/http asks for the body, and the upload may have waited until then.
		body.first = func() { control.SetWriteDeadline(time.Now().Add(s.config.StallTimeout)) }
	}
	return body
}
