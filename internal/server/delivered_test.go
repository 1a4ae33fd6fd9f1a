package server

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// TestDelivered proves that net/http reads the end of a connection that is gRPC's, and that whatever it
// then does to it does nothing.
func TestDelivered(t *testing.T) {
	client, accepted := tcpPair(t)

	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	for _, field := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":path", "/"}, {"content-type", "application/grpc"}, {"user-agent", "grpc-test/1"}} {
		encoder.WriteField(hpack.HeaderField{Name: field[0], Value: field[1]})
	}
	framer := http2.NewFramer(client, client)
	io.WriteString(client, http2.ClientPreface)
	framer.WriteSettings()
	go func() {
		framer.ReadFrame() // the server's settings
		framer.WriteSettingsAck()
		framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true})
	}()

	var came []byte
	g := newGreeter(DefaultConfig, slog.Default(), func(conn net.Conn, beginning []byte) { came = bytes.Clone(beginning) })
	conn := g.greet(accepted)
	for range 2 {
		if n, err := conn.Read(make([]byte, 14)); n != 0 || err != io.EOF {
			t.Fatalf("net/http read %d bytes, %v; want the end", n, err)
		}
	}
	var want bytes.Buffer
	want.WriteString(http2.ClientPreface)
	framer = http2.NewFramer(&want, nil)
	framer.WriteSettings()
	framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true})
	if !bytes.Equal(came, want.Bytes()) {
		t.Errorf("gRPC got %q; want %q", came, want.Bytes())
	}
	if len(g.open) > 0 {
		t.Error("the connection counts as one of which is not known whose it is")
	}

	past := time.Unix(1, 0)
	conn.SetReadDeadline(past)
	conn.SetWriteDeadline(past)
	conn.SetDeadline(past)
	conn.Close()
	if _, err := accepted.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	client.Write([]byte("x"))
	if _, err := accepted.Read(make([]byte, 1)); err != nil {
		t.Error(err)
	}
}

// tcpPair returns the two ends of a connection.
func tcpPair(t *testing.T) (client, accepted *net.TCPConn) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	other, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { other.Close() })
	return conn.(*net.TCPConn), other.(*net.TCPConn)
}

// TestReleaseFails proves that nothing more is sent on a connection where what was held could not be sent.
func TestReleaseFails(t *testing.T) {
	_, accepted := tcpPair(t)
	conn := newGreeter(DefaultConfig, slog.Default(), nil).greet(accepted)
	conn.hold()
	if n, err := conn.Write([]byte("held")); n != 4 || err != nil {
		t.Fatal(n, err)
	}
	conn.SetWriteDeadline(time.Unix(1, 0))
	if err := conn.release(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("release returned %v", err)
	}
	conn.SetWriteDeadline(time.Time{}) // as net/http does
	if _, err := conn.Write([]byte("the next answer")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the next answer was written, %v", err)
	}
}

// TestGreetTime has clients that are connected and make no call. They are left to net/http, but not in the
// middle of a frame.
func TestGreetTime(t *testing.T) {
	for name, test := range map[string]struct {
		part string // of the next frame
		err  error
	}{
		"idle":               {"", nil},
		"the part of a ping": {"\x00\x00\x08", os.ErrDeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			client, accepted := tcpPair(t)
			config := DefaultConfig
			config.IdleTimeout = 20 * time.Second // after which it would be closed
			config.HeaderTimeout = time.Second
			g := newGreeter(config, slog.Default(), func(net.Conn, []byte) { t.Error("the connection is taken for gRPC's") })
			g.time = 100 * time.Millisecond
			var began bytes.Buffer
			began.WriteString(http2.ClientPreface)
			http2.NewFramer(&began, nil).WriteSettings()
			client.Write(append(bytes.Clone(began.Bytes()), test.part...))
			conn := g.greet(accepted)
			got := make([]byte, began.Len())
			if n, err := io.ReadFull(conn, got); !errors.Is(err, test.err) || err == nil && !bytes.Equal(got, began.Bytes()) {
				t.Fatalf("net/http read %q, %v; want what came, %v", got[:n], err, test.err)
			}
			if test.err != nil {
				return
			}
			conn.SetReadDeadline(time.Time{}) // as net/http does behind the preface
			var ping bytes.Buffer
			http2.NewFramer(&ping, nil).WritePing(false, [8]byte{1})
			client.Write(ping.Bytes())
			got = make([]byte, ping.Len())
			if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, ping.Bytes()) {
				t.Errorf("net/http read %q, %v; want the ping", got, err)
			}
		})
	}
}
