package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/polykit/polykit-cache/internal/artifact"
)

const getLong = `get downloads the artifact under KEY into a file, or with --extract the files in it into a
directory.

The bytes go to a file of their own first: <output>.<first 16 digits of the hash>.part beside the
output, or beside DIR with --extract; directories above it are created. It is renamed to the
output, replacing what is there, when all bytes have arrived and their SHA-256 is the one that the
server names; if it is another, the part file is removed and the command fails. A transfer that
breaks is continued where it broke, up to --retries times with growing pauses. If the command
fails for good or is interrupted, the part file is kept, and the same command, run again,
continues there. Of an artifact that was replaced on the server in between nothing is kept.

To standard output the bytes go as they arrive; whether all of them were right is known only from
the exit status.

With --extract the artifact is verified in full before the first of its files is written: the tar
archive, its manifest and the hash of every file. DIR is created if it does not exist. Nothing
outside DIR is ever written; files in DIR that the artifact has too are replaced, others are left
alone. Of the files' permissions only "executable" is kept.

On success it prints the key, the size, the hash and the output, or with --json an object with
cache_key, hash, size and output, and file_count with --extract. It prints nothing if the artifact
goes to standard output.

If the server has no artifact under KEY nothing is created and the exit status is 3.`

const getExample = `  polykit-cache get 0123456789abcdef0123456789abcdef
  polykit-cache get 0123456789abcdef0123456789abcdef --extract dist/ || make dist
  polykit-cache get 0123456789abcdef0123456789abcdef -o - | zstd -dc | tar -t`

// firstBackoff is the pause before the first retry. Each further pause is twice as long.
const firstBackoff = 500 * time.Millisecond

func getCommand() *cobra.Command {
	var flags remoteFlags
	g := &get{backoff: firstBackoff, maxUnpackedSize: sizeFlag(artifact.DefaultLimits.UnpackedSize)}
	cmd := &cobra.Command{
		Use:     "get KEY",
		Short:   "Download an artifact",
		Long:    getLong,
		Example: getExample,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if err := g.check(); err != nil {
				return err
			}
			if g.server, g.key, err = flags.connectFor(cmd.ErrOrStderr(), args[0]); err != nil {
				return err
			}
			defer g.server.Close()
			g.progress = progressFor(cmd, flags.json)
			done, err := g.run(cmd.Context(), cmd.OutOrStdout())
			switch {
			case err != nil:
				return explain(g.key, err)
			case g.output == "-":
				return nil
			case flags.json:
				return done.print(cmd.OutOrStdout())
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s  %s  %s  %s\n", done.CacheKey, formatSize(done.Size), done.Hash, done.Output)
			return err
		},
	}
	f := cmd.Flags()
	flags.add(f)
	f.StringVarP(&g.output, "output", "o", "", "`file` to write the artifact to, or - for standard output (default KEY.zst in the current directory)")
	f.StringVar(&g.extract, "extract", "", "`directory` to extract the files in the artifact to")
	f.Var(&g.maxUnpackedSize, "max-unpacked-size", "most bytes that an artifact may unpack to, with --extract")
	f.IntVar(&g.retries, "retries", 3, "how many times a transfer that broke is continued")
	return cmd
}

// get is one run of the command.
type get struct {
	server          remote
	key             artifact.Key
	output          string // or "", for a name made of the key
	extract         string // or ""
	maxUnpackedSize sizeFlag
	retries         int
	backoff         time.Duration
	progress        progressFunc
}

func (g *get) check() error {
	if g.retries < 0 {
		return usageError("--retries is %d; it must not be negative", g.retries)
	}
	if g.extract != "" && g.output != "" {
		return usageError("--output and --extract were both given; only one of them can be")
	}
	if info, err := os.Stat(g.output); err == nil && info.IsDir() {
		return usageError("--output is %s, a directory: name a file, or use --extract", g.output)
	}
	return nil
}

// run downloads the artifact.
func (g *get) run(ctx context.Context, stdout io.Writer) (result, error) {
	if g.output == "-" {
		t := g.transfer(&streamTarget{stdout})
		if err := t.run(ctx); err != nil {
			return result{}, err
		}
		return g.result(t, "-"), t.check()
	}
	output := filepath.Clean(cmp.Or(g.output, g.key.String()+".zst"))
	if g.extract != "" {
		var err error
		if output, err = filepath.Abs(g.extract); err != nil { // for "." to have a name
			return result{}, err
		}
	}

	part := &partFile{output: output}
	defer part.close()
	t := g.transfer(part)
	if err := g.resume(ctx, t, part); err != nil {
		return result{}, err
	}
	if err := t.run(ctx); err != nil {
		return result{}, part.keep(t, err)
	}
	if err := t.check(); err != nil {
		return result{}, errors.Join(err, part.remove())
	}
	if g.extract != "" {
		return g.extractPart(ctx, t, part)
	}
	return g.result(t, output), part.rename()
}

func (g *get) transfer(target target) *transfer {
	return &transfer{server: g.server, key: g.key, target: target, retries: g.retries, backoff: g.backoff, progress: g.progress}
}

// resume lets t begin with what an earlier run has left behind.
func (g *get) resume(ctx context.Context, t *transfer, part *partFile) error {
	left := part.leftBehind()
	if len(left) == 0 {
		return nil
	}
	stat, err := g.server.Stat(ctx, g.key)
	if err != nil {
		return err
	}
	hash, err := artifact.ParseDigest(stat.GetHash())
	if err != nil {
		return fmt.Errorf("the server says a hash that is %w", err)
	}
	for _, path := range left {
		if path == part.path(hash) {
			err = errors.Join(err, t.begin(hash, stat.GetSize()))
		} else {
			err = errors.Join(err, os.Remove(path)) // of an artifact that was replaced
		}
	}
	return err
}

// extractPart extracts the artifact in the part file, and removes that when it is of no use any more.
func (g *get) extractPart(ctx context.Context, t *transfer, part *partFile) (result, error) {
	if err := os.MkdirAll(g.extract, 0o777); err != nil {
		return result{}, err
	}
	dir, err := os.OpenRoot(g.extract)
	if err != nil {
		return result{}, err
	}
	defer dir.Close()
	if _, err := part.file.Seek(0, io.SeekStart); err != nil {
		return result{}, err
	}
	limits := artifact.DefaultLimits
	limits.UnpackedSize = int64(g.maxUnpackedSize)
	contents, err := artifact.NewVerifier(limits).Extract(&cancelReader{ctx, part.file}, g.key, dir)
	if errors.Is(err, artifact.ErrUnsound) {
		return result{}, errors.Join(fmt.Errorf("the artifact was not extracted: %w", err), part.remove())
	}
	if err != nil {
		return result{}, part.keep(t, err)
	}
	done := g.result(t, g.extract)
	done.FileCount = len(contents.Files)
	return done, part.remove()
}

func (g *get) result(t *transfer, output string) result {
	return result{CacheKey: g.key.String(), Hash: t.hash.String(), Size: t.n, Output: output}
}

// cancelReader reads until ctx is done.
type cancelReader struct {
	ctx context.Context
	io.ReadSeeker
}

func (c *cancelReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.ReadSeeker.Read(p)
}
