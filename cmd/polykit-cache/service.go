package main

import (
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"syscall"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/auth"
	"github.com/polykit/polykit-cache/internal/cache"
	"github.com/polykit/polykit-cache/internal/certs"
	"github.com/polykit/polykit-cache/internal/disk"
	"github.com/polykit/polykit-cache/internal/metrics"
	"github.com/polykit/polykit-cache/internal/retention"
	"github.com/polykit/polykit-cache/internal/server"
)

// serve serves until ctx is done: everything is opened, said, and then run, and given back in the opposite order.
func (c *serveConfig) serve(ctx context.Context, logTo io.Writer) (err error) {
	s := &service{config: c}
	s.log, s.level = newLog(logTo, c.logFormat.value, c.logLevel.value)
	defer func() {
		if err == nil {
			s.log.Info("stopped")
		}
	}()
	defer func() {
		for i := range s.opened {
			s.opened[len(s.opened)-1-i]()
		}
	}()
	if err := s.open(ctx, logTo); err != nil {
		return err
	}
	defer runtime.KeepAlive(paceCollector(c.limits.systemMemory))
	s.announce()
	running, stop := context.WithCancel(context.WithoutCancel(ctx)) // as long as requests are answered
	var background sync.WaitGroup
	defer func() {
		stop()
		background.Wait()
	}()
	for _, work := range s.work(ctx) {
		background.Go(func() { work(running) })
	}
	return s.server.Serve(ctx, s.listener)
}

// service is all that a server that runs consists of.
type service struct {
	config   *serveConfig
	log      *slog.Logger
	level    *logLevel
	traces   *tracing            // nil if nothing is traced
	certs    *certs.Certs        // nil in clear text
	auth     *auth.Authenticator // nil if everybody may do everything
	manager  *serviceManager
	hangups  chan os.Signal
	verifier *artifact.Verifier
	store    *storage
	listener net.Listener
	passed   bool   // the service manager passed the listener
	admin    *admin // nil without an admin address
	metrics  *metrics.Metrics
	server   *server.Server

	opened []func() // give back what was opened
}

func (s *service) open(ctx context.Context, logTo io.Writer) (err error) {
	for _, warning := range environmentWarnings(os.Environ()) {
		s.log.Warn(warning)
	}
	if s.traces, err = newTracing(ctx, logTo, s.log); err != nil {
		return err
	}
	if s.traces != nil {
		s.log = slog.New(traceIDs{s.log.Handler()})
		s.opened = append(s.opened, func() { s.traces.close(s.config.server.ShutdownTimeout) })
	}
	if s.certs, err = s.config.tls.load(s.log); err != nil {
		return err
	}
	if s.config.authFile != "" {
		if s.auth, err = auth.New(auth.Config{File: s.config.authFile, Log: s.log}); err != nil {
			return err
		}
	}
	s.manager = newServiceManager(s.log)
	s.manager.tell("STATUS=Opening the storage")
	s.hangups = make(chan os.Signal, 1)
	if s.certs != nil || s.auth != nil || s.manager != nil { // it reloads a service whether there is anything to read or not
		signal.Notify(s.hangups, syscall.SIGHUP)
		s.opened = append(s.opened, func() { signal.Stop(s.hangups) })
	}
	if err := s.openStore(); err != nil {
		return err
	}
	if s.listener, s.passed, err = s.config.listen(); err != nil {
		return err
	}
	if s.config.adminAddress != "" {
		if s.admin, err = newAdmin(s.config.adminAddress, s.log); err != nil {
			s.listener.Close()
			return err
		}
	}
	s.newServer()
	return nil
}

func (s *service) openStore() (err error) {
	s.verifier = artifact.NewVerifier(s.config.limits.limits())
	s.store, err = openStorage(disk.Config{
		Dir:        s.config.storageDir,
		Verifier:   s.verifier,
		Durability: disk.Durability(s.config.durability.value),
		HotSize:    int64(s.config.hotSize),
		Log:        s.log,
	}, &s.config.retention, s.log)
	if err != nil {
		return err
	}
	s.opened = append(s.opened, func() {
		if err := s.store.Close(); err != nil {
			s.log.Error("could not close the storage in good order; the next start goes through it in the background", "error", err)
		}
	})
	if s.traces != nil {
		s.store.collector.Trace(s.traces.provider.Tracer(retention.TracerName))
	}
	return nil
}

func (s *service) newServer() {
	s.metrics = metrics.New()
	s.metrics.Build(version(), runtime.Version())
	config := s.config.server
	config.Auth, config.Handover, config.Metrics, config.TrustedProxies = s.auth, s.passed, s.metrics, s.config.trustedProxies
	config.Management = &server.Management{Index: s.store.index, Collector: s.store.collector, Storage: s.store}
	if s.certs != nil {
		config.TLS = s.certs.Config()
	}
	if s.traces != nil {
		config.Traces = s.traces.server()
	}
	s.server = server.New(cache.New(s.store, s.verifier, cache.Config{MaxSize: int64(s.config.limits.maxSize), Observer: s.store.index}), config, s.log)
	s.metrics.Watch(metrics.Sources{
		Index: s.store.index, Collector: s.store.collector, Store: s.store.Store, Verifier: s.verifier,
		Requests: s.server.InFlight, Connections: s.server.Connections, ConnectionsLimit: s.config.server.MaxConnections,
		Ready: s.server.Ready, Refusals: s.server.Refusals,
	})
}

// announce says what it is that runs, and what is wrong with it.
func (s *service) announce() {
	s.config.logResources(s.log)
	adminAddress := ""
	if s.admin != nil {
		adminAddress = s.admin.listener.Addr().String()
	}
	address := s.listener.Addr()
	s.log.Info("listening", "address", address.String(), "storage_dir", s.config.storageDir, "max_size", s.config.limits.maxSize.String(),
		"max_connections", s.config.server.MaxConnections, "max_uploads", s.verifier.Slots(), "tls", s.certs != nil, "auth", s.auth != nil,
		"admin_address", adminAddress, "version", version())
	if s.passed {
		s.log.Info("serving on the socket that the service manager passed, whatever --bind and --port are by default", "address", address.String())
	}
	if tcp, ok := address.(*net.TCPAddr); ok && s.auth == nil && !tcp.IP.IsLoopback() {
		s.log.Warn("everybody who can reach this address may read, write and delete everything: give --auth-file, bind to an address that only those can reach who may, or put something in front that asks who they are",
			"address", address.String())
	}
}

// work returns what runs in the background, each until its context is done. That of the server itself is done before.
func (s *service) work(serves context.Context) []func(context.Context) {
	work := []func(context.Context){
		s.store.run,
		s.level.onSignals,
		func(running context.Context) { onSignal(running, s.hangups, func() { s.manager.reload(s.reload) }) },
		func(running context.Context) {
			s.manager.run(serves, running, serving{s.listener.Addr(), s.certs != nil, s.server.Ready, s.store.index.DiskSize, s.config.server.ShutdownTimeout})
		},
	}
	if s.auth != nil {
		work = append(work, s.auth.Run)
	}
	if s.admin != nil {
		work = append(work, func(running context.Context) { s.admin.serve(running, s.admin.routes(s.server, s.metrics, s.level)) })
	}
	if s.config.scrub.Interval > 0 {
		work = append(work, func(running context.Context) { s.store.Scrub(running, s.config.scrub) })
	}
	return work
}

// reload reads the files anew that can be changed while the server runs. They log what is wrong with them.
func (s *service) reload() {
	if s.certs != nil {
		s.certs.Reload()
	}
	if s.auth != nil {
		s.auth.Reload()
	}
}
