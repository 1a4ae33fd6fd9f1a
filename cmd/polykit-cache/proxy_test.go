package main

import (
	"io"
	"net"
	"sync"
	"testing"
)

// cutter is a TCP proxy that cuts connections, and counts what it passes on.
type cutter struct {
	listener net.Listener
	legs     []leg

	mu   sync.Mutex
	down []int64 // bytes passed to the client, by connection
	sent []byte  // bytes passed to the servers, by all connections
}

// leg is what happens to one connection.
type leg struct {
	server string // address
	cut    int64  // bytes that are passed to the client before the connection is cut; 0 for all
	hold   bool   // not cut, but held until the client cuts it
}

// newCutter returns a cutter. The last leg is also for all connections that have none of their own.
func newCutter(t *testing.T, legs ...leg) *cutter {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cutter{listener: listener, legs: legs}
	var running sync.WaitGroup
	running.Go(func() {
		for i := 0; ; i++ {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			c.mu.Lock()
			c.down = append(c.down, 0)
			c.mu.Unlock()
			running.Go(func() { c.pass(conn, i) })
		}
	})
	t.Cleanup(func() {
		listener.Close()
		running.Wait()
	})
	return c
}

func (c *cutter) url() string { return "http://" + c.listener.Addr().String() }

func (c *cutter) pass(client net.Conn, i int) {
	defer client.Close()
	leg := c.legs[min(i, len(c.legs)-1)]
	server, err := net.Dial("tcp", leg.server)
	if err != nil {
		return
	}
	defer server.Close()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		io.Copy(io.MultiWriter(server, writerFunc(func(p []byte) {
			c.sent = append(c.sent, p...)
		}, &c.mu)), client)
		server.Close()
	}()
	var from io.Reader = server
	if leg.cut > 0 {
		from = io.LimitReader(server, leg.cut)
	}
	io.Copy(io.MultiWriter(client, writerFunc(func(p []byte) {
		c.down[i] += int64(len(p))
	}, &c.mu)), from)
	if leg.hold {
		<-ended
	}
}

// passed returns the bytes passed to the client by each connection, and all that were passed to the
// servers.
func (c *cutter) passed() (down []int64, sent []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append(down, c.down...), append(sent, c.sent...)
}

type lockedFunc struct {
	write func([]byte)
	mu    *sync.Mutex
}

func writerFunc(write func([]byte), mu *sync.Mutex) io.Writer { return lockedFunc{write, mu} }

func (f lockedFunc) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.write(p)
	return len(p), nil
}
