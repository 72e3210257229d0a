package nri

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	nrilog "github.com/containerd/nri/pkg/log"
)

// The library has one logger for the whole process.
var (
	logger  atomic.Pointer[slog.Logger]
	chatty  atomic.Bool // what the library says of its start is for debugging
	replace sync.Once
)

func setLog(log *slog.Logger) {
	logger.Store(log)
	replace.Do(func() { nrilog.Set(bridge{}) })
}

// bridge gives the library's lines to the daemon's log.
type bridge struct{}

func line(ctx context.Context, level slog.Level, format string, args []any) {
	if log := logger.Load(); log.Enabled(ctx, level) {
		log.Log(ctx, level, "NRI: "+fmt.Sprintf(format, args...))
	}
}

func (bridge) Debugf(ctx context.Context, format string, args ...any) {
	line(ctx, slog.LevelDebug, format, args)
}

func (bridge) Infof(ctx context.Context, format string, args ...any) {
	level := slog.LevelDebug
	if chatty.Load() {
		level = slog.LevelInfo
	}
	line(ctx, level, format, args)
}

func (bridge) Warnf(ctx context.Context, format string, args ...any) {
	line(ctx, slog.LevelWarn, format, args)
}

func (bridge) Errorf(ctx context.Context, format string, args ...any) {
	line(ctx, slog.LevelWarn, format, args) // of plugins, not of this daemon
}
