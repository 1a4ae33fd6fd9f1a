package server

import (
	"bytes"
	"encoding/binary"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
)

// grpcMessage returns a message of gRPC over HTTP/2 with length bytes of content.
func grpcMessage(length int) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(length)), make([]byte, length)...)
}

// byMessage returns a call with a body, whose client is not too slow.
func byMessage(body io.Reader) *http.Request {
	pace := newPace(time.Hour, 1, func(time.Time) error { return nil })
	return readByMessage(httptest.NewRequest("POST", "/", body), pace)
}

// readInBuffers reads as grpc-go does, in buffers of 16 KiB, and sends how much each read brought.
func readInBuffers(r io.Reader) <-chan int {
	reads := make(chan int, 1000)
	go func() {
		defer close(reads)
		for {
			n, err := r.Read(make([]byte, 16<<10))
			reads <- n
			if err != nil {
				return
			}
		}
	}()
	return reads
}

// TestMessagesAreReadWhenWanted proves that a client which sends faster than its artifact is verified
// has to wait, and does not fill the memory.
func TestMessagesAreReadWhenWanted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const length, count = 1000, 10
		body := bytes.NewReader(bytes.Repeat(grpcMessage(length), count))
		r := byMessage(body)
		readInBuffers(r.Body)
		for want := messagesAhead; want < count; want++ {
			synctest.Wait()
			if read := body.Size() - int64(body.Len()); read != int64(want*(messagePrefix+length)) {
				t.Fatalf("read %d bytes; want the %d of %d messages", read, want*(messagePrefix+length), want)
			}
			r.Body.(*messages).want()
		}
		r.Body.Close()
	})
}

// TestUploadIsNotReadAhead proves that an upload which waits for others holds no chunks but the one
// that was asked for.
func TestUploadIsNotReadAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		body := bytes.NewReader(bytes.Repeat(grpcMessage(1000), 3))
		pace := newPace(time.Hour, 1, func(time.Time) error { return nil })
		r := readByMessage(httptest.NewRequest("POST", cachev1.ArtifactService_PutArtifact_FullMethodName, body), pace)
		readInBuffers(r.Body)
		for asked := range 3 {
			synctest.Wait()
			if read, want := body.Size()-int64(body.Len()), int64(asked*(messagePrefix+1000)); read != want {
				t.Errorf("read %d bytes; want the %d of %d messages", read, want, asked)
			}
			r.Body.(*messages).want()
		}
		r.Body.Close()
	})
}

// TestMessagesEndEarly proves that a call which ends while a message is waited for does not look as if
// the client had sent all.
func TestMessagesEndEarly(t *testing.T) {
	body := bytes.NewReader(grpcMessage(1000))
	pace := newPace(time.Hour, 1, func(time.Time) error { return nil })
	r := readByMessage(httptest.NewRequest("POST", cachev1.ArtifactService_PutArtifact_FullMethodName, body), pace)
	r.Body.Close()
	if n, err := r.Body.Read(make([]byte, 100)); n != 0 || err != io.ErrUnexpectedEOF {
		t.Errorf("read %d bytes, %v; want %v", n, err, io.ErrUnexpectedEOF)
	}
}

// TestMessagesFillBuffers proves that a client which sends a byte at a time does not cost a buffer
// for each.
func TestMessagesFillBuffers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := byMessage(iotest.OneByteReader(bytes.NewReader(grpcMessage(40_000))))
		reads := readInBuffers(r.Body)
		for _, want := range []int{messagePrefix, 16 << 10, 16 << 10, 40_000 - 32<<10, 0} {
			if n := <-reads; n != want {
				t.Errorf("a read brought %d bytes; want %d", n, want)
			}
		}
		r.Body.Close()
	})
}

// TestMessagesOverTheLimit proves that nothing is read of a message that is refused for its length.
func TestMessagesOverTheLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		body := bytes.NewReader(grpcMessage(maxMessageSize + 1))
		r := byMessage(body)
		reads := readInBuffers(r.Body)
		synctest.Wait()
		if read := body.Size() - int64(body.Len()); read != messagePrefix {
			t.Errorf("read %d bytes; want the %d of the prefix", read, messagePrefix)
		}
		r.Body.Close()
		if first, second := <-reads, <-reads; first != messagePrefix || second != 0 {
			t.Errorf("reads brought %d and %d bytes; want the prefix and the end", first, second)
		}
	})
}
