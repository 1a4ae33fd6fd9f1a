package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/client"
)

const putLong = `put uploads an artifact under KEY: 32 to 128 hexadecimal digits, usually a hash of everything that
what is in the artifact depends on.

FILE is an artifact that is there already, made by "polykit-cache pack" or by Polykit for this
very key, and is uploaded as it is; "-" is standard input. DIR is packed first: all files in it,
with the metadata that --package, --task and --command give. The server verifies the artifact
while it arrives and stores it only if it is sound.

An artifact never changes once it is stored: if the server has one under KEY, nothing is uploaded
and the exit status is 4.

On success it prints the key, the size and the SHA-256 of the artifact, or with --json an object
with cache_key, size and hash.`

const putExample = `  polykit-cache put 0123456789abcdef0123456789abcdef dist/
  polykit-cache put 0123456789abcdef0123456789abcdef artifact.zst --server https://cache.example.com
  pack-somehow | polykit-cache put 0123456789abcdef0123456789abcdef - --grpc`

func putCommand() *cobra.Command {
	var flags remoteFlags
	var metadata metadataFlags
	cmd := &cobra.Command{
		Use:     "put KEY FILE|DIR",
		Short:   "Upload an artifact",
		Long:    putLong,
		Example: putExample,
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			server, key, err := flags.connectFor(cmd.ErrOrStderr(), args[0])
			if err != nil {
				return err
			}
			defer server.Close()
			p := &put{server, key, metadata, progressFor(cmd, flags.json)}
			done, err := p.run(cmd.Context(), args[1], cmd.InOrStdin())
			if err != nil {
				return explain(key, err)
			}
			if flags.json {
				return done.print(cmd.OutOrStdout())
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s  %s  %s\n", done.CacheKey, formatSize(done.Size), done.Hash)
			return err
		},
	}
	flags.add(cmd.Flags())
	metadata.add(cmd.Flags(), "put")
	return cmd
}

// put is one run of the command.
type put struct {
	server   remote
	key      artifact.Key
	metadata metadataFlags
	progress progressFunc
}

// run uploads what path names.
func (p *put) run(ctx context.Context, path string, stdin io.Reader) (result, error) {
	if path == "-" {
		return p.upload(ctx, client.UnknownSize, stdin)
	}
	info, err := os.Stat(path)
	if err != nil {
		return result{}, err
	}
	if info.IsDir() {
		return p.uploadDir(ctx, path)
	}
	return p.uploadFile(ctx, path)
}

func (p *put) uploadFile(ctx context.Context, path string) (result, error) {
	file, err := os.Open(path)
	if err != nil {
		return result{}, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return result{}, err
	}
	size := info.Size()
	if !info.Mode().IsRegular() { // a pipe
		size = client.UnknownSize
	}
	return p.upload(ctx, size, file)
}

// uploadDir packs a directory into a temporary file, since the packing finds faults that would break
// an upload off in the middle, and uploads that.
func (p *put) uploadDir(ctx context.Context, dir string) (_ result, err error) {
	file, err := os.CreateTemp("", "polykit-cache-*.zst")
	if err != nil {
		return result{}, err
	}
	defer func() { err = errors.Join(err, os.Remove(file.Name())) }()
	defer file.Close()
	metadata, err := p.metadata.of(dir)
	if err != nil {
		return result{}, err
	}
	if _, err := packDir(ctx, file, dir, p.key, metadata, p.progress); err != nil {
		return result{}, err
	}
	size, err := file.Seek(0, io.SeekCurrent)
	if err != nil {
		return result{}, err
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return result{}, err
	}
	return p.upload(ctx, size, file)
}

func (p *put) upload(ctx context.Context, size int64, r io.Reader) (result, error) {
	bar := p.progress("uploading", size)
	defer bar.stop()
	sum := sha256.New()
	sent := &counter{}
	if err := p.server.Put(ctx, p.key, size, io.TeeReader(r, io.MultiWriter(sum, sent, bar))); err != nil {
		return result{}, err
	}
	return result{CacheKey: p.key.String(), Hash: artifact.Digest(sum.Sum(nil)).String(), Size: sent.n}, nil
}

// counter counts what is written to it.
type counter struct{ n int64 }

func (c *counter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return len(p), nil
}
