package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strings"

	"github.com/polykit/polykit-cache/internal/server"
)

// levels are the levels of the log, by name. slog has no name for trace.
var levels = map[string]slog.Level{
	"trace": server.LevelTrace,
	"debug": slog.LevelDebug,
	"info":  slog.LevelInfo,
	"warn":  slog.LevelWarn,
	"error": slog.LevelError,
}

// levelName returns the name of a level, as --log-level has it.
func levelName(level slog.Level) string {
	for name, known := range levels {
		if known == level {
			return name
		}
	}
	return level.String()
}

// logLevel is the least level that is logged, which can be changed while the server runs.
type logLevel struct {
	slog.LevelVar
	configured slog.Level // by --log-level
	log        *slog.Logger
}

// newLog returns a log of a format and the least level of what is in it.
func newLog(to io.Writer, format, least string) (*slog.Logger, *logLevel) {
	level := &logLevel{configured: levels[least]}
	level.Set(level.configured)
	options := &slog.HandlerOptions{Level: level, ReplaceAttr: nameTrace}
	level.log = slog.New(slog.NewTextHandler(to, options))
	if format == "json" {
		level.log = slog.New(slog.NewJSONHandler(to, options))
	}
	return level.log, level
}

func nameTrace(_ []string, attr slog.Attr) slog.Attr {
	if level, ok := attr.Value.Any().(slog.Level); ok && attr.Key == slog.LevelKey && level == levels["trace"] {
		return slog.String(slog.LevelKey, "TRACE")
	}
	return attr
}

// change changes the level, and says so whatever is logged.
func (l *logLevel) change(to slog.Level) {
	from := l.Level()
	l.Set(to)
	l.log.Log(context.Background(), max(to, slog.LevelInfo), "changed the log level", "from", levelName(from), "to", levelName(to))
}

// onSignals changes the level to debug with each signal of toggleSignals, or back to what --log-level says, until ctx is
// done.
func (l *logLevel) onSignals(ctx context.Context) {
	if len(toggleSignals) == 0 {
		return
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, toggleSignals...)
	defer signal.Stop(signals)
	onSignal(ctx, signals, func() {
		to := slog.LevelDebug
		if l.Level() != l.configured {
			to = l.configured
		}
		l.change(to)
	})
}

// ServeHTTP answers GET with the level, and changes it with PUT.
func (l *logLevel) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodPut {
		body, err := io.ReadAll(io.LimitReader(r.Body, 100))
		level, known := levels[strings.TrimSpace(string(body))]
		if err != nil || !known {
			http.Error(w, fmt.Sprintf("the body must be one of %s", strings.Join(slices.Sorted(maps.Keys(levels)), ", ")), http.StatusBadRequest)
			return
		}
		l.change(level)
	}
	fmt.Fprintln(w, levelName(l.Level()))
}
