package cache

import (
	"context"

	"github.com/polykit/polykit-cache/internal/artifact"
)

// Trace does all that an upload does to be traced, and nothing else.
func (c *Cache) Trace(ctx context.Context, info artifact.Info) {
	c.describe(ctx, info.Key, info)
	for _, name := range []string{"queue", "verify", "commit"} {
		begin(ctx, name, info).end(info, nil)
	}
}
