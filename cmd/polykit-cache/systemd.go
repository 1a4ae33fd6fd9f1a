package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/dustin/go-humanize"
)

// A service manager, which is systemd or speaks as it does, may pass the socket to serve on (sd_listen_fds(3)) and
// ask to be told how the server does (sd_notify(3)). Without its variables in the environment nothing here is done.

const (
	// statusInterval is how often it is looked whether the status has changed.
	statusInterval = 15 * time.Second

	// stopMargin is how much longer than --shutdown-timeout the end of the server may take: the storage is
	// closed after the last request.
	stopMargin = 15 * time.Second
)

// listen returns what to serve on, and whether the service manager passed it: then it keeps it open when this
// process ends, and connections wait in it.
func (c *serveConfig) listen() (listener net.Listener, passed bool, err error) {
	listeners, err := activation.Listeners()
	if err != nil {
		return nil, false, err
	}
	if len(listeners) == 0 {
		listener, err = net.Listen("tcp", net.JoinHostPort(c.bind, strconv.Itoa(c.port)))
		return listener, false, err
	}
	if len(listeners) > 1 {
		return nil, true, usageError("the service manager passed %d sockets, and the server has one port: leave one ListenStream= in the socket unit", len(listeners))
	}
	tcp, ok := listeners[0].(*net.TCPListener)
	if !ok {
		return nil, true, usageError("the socket that the service manager passed does not listen for TCP: give a port, or an address and a port, with ListenStream= in the socket unit")
	}
	return tcp, true, c.checkPassed(tcp.Addr().(*net.TCPAddr))
}

// checkPassed returns an error if the flags say another address than the one of the socket that was passed. Who
// sets them expects them to be heeded.
func (c *serveConfig) checkPassed(passed *net.TCPAddr) error {
	if c.given("port") && c.port != 0 && c.port != passed.Port {
		return usageError("--port is %d, but the service manager passed a socket on %v: say the port with ListenStream= in the socket unit, and leave --port out", c.port, passed)
	}
	if !c.given("bind") {
		return nil
	}
	bind, err := net.ResolveIPAddr("ip", c.bind)
	if err != nil || !bind.IP.Equal(passed.IP) && !(bind.IP.IsUnspecified() && passed.IP.IsUnspecified()) {
		return usageError("--bind is %q, but the service manager passed a socket on %v: say the address with ListenStream= in the socket unit, and leave --bind out", c.bind, passed)
	}
	return nil
}

// serviceManager is told how the server does. Nil is none.
type serviceManager struct {
	log *slog.Logger
	// watchdog is the time after which the service manager ends a server that has not said that it answers, 0 for
	// never.
	watchdog time.Duration
	url      string // of the server
	probe    *http.Transport

	mu     sync.Mutex // orders what is told of the status
	status string     // as it was told last
}

// newServiceManager returns the service manager that started this process, nil if none asks to be told anything.
func newServiceManager(log *slog.Logger) *serviceManager {
	if os.Getenv("NOTIFY_SOCKET") == "" {
		return nil
	}
	watchdog, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		log.Warn("there is no watchdog: WATCHDOG_USEC or WATCHDOG_PID in the environment is no number", "error", err)
	}
	return &serviceManager{log: log, watchdog: watchdog}
}

// tell tells the service manager all of some assignments at once.
func (m *serviceManager) tell(assignments ...string) {
	if m == nil {
		return
	}
	if _, err := daemon.SdNotify(false, strings.Join(assignments, "\n")); err != nil {
		m.log.Warn("could not tell the service manager how the server does", "assignments", assignments, "error", err)
	}
}

// reload does what SIGHUP asks for, and tells the service manager when it is done.
func (m *serviceManager) reload(reload func()) {
	m.tell(daemon.SdNotifyReloading, strings.TrimSpace(daemon.SdNotifyMonotonicUsec()))
	reload()
	m.tell(daemon.SdNotifyReady)
}

// serving is what the service manager is told of.
type serving struct {
	address  net.Addr
	tls      bool
	ready    func(context.Context) error
	diskSize func() int64  // in bytes
	timeout  time.Duration // for the requests in flight at the end
}

// run tells the service manager that the server is ready, and goes on to tell it how it does: until ctx is done,
// from when on the server stops, and then until running is.
func (m *serviceManager) run(ctx, running context.Context, s serving) {
	if m == nil {
		return
	}
	m.url = "http://" + s.address.String()
	if s.tls {
		m.url = "https://" + s.address.String()
	}
	// It asks itself, so there is nobody to be sure of; and the certificate is for another name.
	m.probe = &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	live, end := context.WithCancel(ctx)
	defer context.AfterFunc(running, end)() // a server that fails stops too
	m.tell(daemon.SdNotifyReady)
	// By itself, since it looks at the disk: that one that does not answer is no reason to restart.
	var looking sync.WaitGroup
	looking.Go(func() {
		every(live, statusInterval, func() { m.tellStatus(live, s) })
	})
	beat := max(m.watchdog/4, time.Millisecond)
	if m.watchdog > 0 {
		every(live, beat, func() { m.beat(live) })
	}
	<-live.Done()
	m.mu.Lock()
	m.tell(daemon.SdNotifyStopping, fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", (s.timeout+stopMargin).Microseconds()),
		fmt.Sprintf("STATUS=Stopping; requests in flight get up to %v to finish", s.timeout))
	m.mu.Unlock()
	if m.watchdog > 0 { // nobody listens any more, so there is nothing to ask; how long this goes on is bounded
		every(running, beat, func() { m.tell(daemon.SdNotifyWatchdog) })
	}
	looking.Wait()
}

// every does something now and then, until ctx is done.
func every(ctx context.Context, interval time.Duration, do func()) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for ctx.Err() == nil {
		do()
		select {
		case <-ticker.C:
		case <-ctx.Done():
		}
	}
}

// beat tells the service manager that the server answers, if it does.
func (m *serviceManager) beat(ctx context.Context) {
	if err := m.ask(ctx); err == nil {
		m.tell(daemon.SdNotifyWatchdog)
	} else if ctx.Err() == nil {
		m.log.Error("the server does not answer its own health check; if that lasts, the service manager restarts it", "after", m.watchdog, "error", err)
	}
}

// ask asks the server for its health as a client would, over a connection of its own, and returns an error if it
// does not answer. Asked every quarter of the time that the watchdog waits, it may take half of it.
func (m *serviceManager) ask(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, m.watchdog/2, fmt.Errorf("no answer within %v", m.watchdog/2))
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, m.url+"/healthz", nil)
	if err != nil {
		return err
	}
	response, err := m.probe.RoundTrip(request)
	if err != nil {
		dial, ok := errors.AsType[*net.OpError](err)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if ok && dial.Op == "dial" {
			return err
		}
		return nil // that somebody closed the connection, as it does with those that are too many, is an answer too
	}
	response.Body.Close()
	if response.StatusCode != http.StatusOK && response.StatusCode != http.StatusServiceUnavailable {
		return errors.New(response.Status)
	}
	return nil
}

// tellStatus tells one line for who looks at the service, if it changed, and not once the server stops.
func (m *serviceManager) tellStatus(ctx context.Context, s serving) {
	state := "Ready"
	if err := s.ready(ctx); err != nil {
		state = "NOT READY for uploads (" + strings.ReplaceAll(err.Error(), "\n", " ") + ")"
	}
	status := fmt.Sprintf("STATUS=%s on %s; stored: %s", state, m.url, humanize.IBytes(uint64(max(0, s.diskSize()))))
	m.mu.Lock()
	defer m.mu.Unlock()
	if status != m.status && ctx.Err() == nil {
		m.status = status
		m.tell(status)
	}
}
