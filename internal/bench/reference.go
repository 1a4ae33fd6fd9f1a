//go:build linux

package main

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/klauspost/compress/zstd"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	cachev1 "github.com/polykit/polykit-cache/gen/polykit/cache/v1"
)

// referenceArg is the first argument of this program where it is started as a reference.
const referenceArg = "reference"

// done is what a reference that is a loop has done.
type done struct {
	Operations int64         `json:"operations"`
	Elapsed    time.Duration `json:"elapsed"`
	CPU        time.Duration `json:"cpu"`
}

// reference is this program as a reference: verify, write or commit, which print what they have done, or
// grpc, which is a server until it is ended.
func reference(args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet(referenceArg, flag.ContinueOnError)
	duration := flags.Duration("duration", time.Second, "of a loop")
	dir := flags.String("dir", "", "for the files of a loop")
	clients := flags.Int("clients", 1, "loops at once")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 2 {
		return errors.New("a reference is given its name and an artifact")
	}
	content, err := os.ReadFile(flags.Arg(1))
	if err != nil {
		return err
	}
	var operation func(n int64) error
	switch name := flags.Arg(0); name {
	case "grpc":
		return serveGRPC(content)
	case "verify":
		operation, err = verifier(content)
	case "write":
		// What is written stays until the end, as it does in a cache: a file that took the memory of one that
		// was just removed would cost a fraction.
		if *dir, err = os.MkdirTemp(*dir, "write-"); err != nil {
			return err
		}
		defer os.RemoveAll(*dir)
		operation = func(n int64) error {
			_, err := writeSynced(*dir, n, content)
			return err
		}
	case "commit":
		operation = func(n int64) error { return commit(*dir, n, content) }
	default:
		return fmt.Errorf("there is no reference %q", name)
	}
	if err != nil {
		return err
	}
	result, err := loop(*duration, *clients, operation)
	if err != nil {
		return err
	}
	return json.NewEncoder(stdout).Encode(result)
}

// loop does operations, each with a number of its own, until duration is over.
func loop(duration time.Duration, clients int, operation func(n int64) error) (done, error) {
	var numbers, operations atomic.Int64
	var loops sync.WaitGroup
	errs := make([]error, clients)
	began, cpu := time.Now(), ownCPU()
	for i := range clients {
		loops.Go(func() {
			for time.Since(began) < duration && errs[i] == nil {
				if errs[i] = operation(numbers.Add(1)); errs[i] == nil {
					operations.Add(1)
				}
			}
		})
	}
	loops.Wait()
	return done{operations.Load(), time.Since(began), ownCPU() - cpu}, errors.Join(errs...)
}

func ownCPU() time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		return 0
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// verifier returns the floor of verification: in one thread, the SHA-256 of the bytes, and of what they
// decode to, as a whole and not file by file.
func verifier(content []byte) (func(int64) error, error) {
	decoder, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	buf := make([]byte, 256<<10)
	var last [2][]byte
	return func(int64) error {
		compressed := sha256.Sum256(content)
		if err := decoder.Reset(bytes.NewReader(content)); err != nil {
			return err
		}
		contents := sha256.New()
		if _, err := io.CopyBuffer(struct{ io.Writer }{contents}, struct{ io.Reader }{decoder}, buf); err != nil {
			return err
		}
		last = [2][]byte{compressed[:], contents.Sum(last[1][:0])}
		return nil
	}, nil
}

// writeSynced creates a file, writes it and syncs it.
func writeSynced(dir string, n int64, content []byte) (path string, err error) {
	path = filepath.Join(dir, strconv.FormatInt(n, 10)+".part")
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return "", err
	}
	_, err = file.Write(content)
	return path, errors.Join(err, file.Sync(), file.Close())
}

// commit is the floor of a small durable upload: create, write, fsync, link. It doesn't remove the first
// name, sync the directory or write a second file, as a server must that means it.
func commit(dir string, n int64, content []byte) error {
	path, err := writeSynced(dir, n, content)
	if err != nil {
		return err
	}
	return os.Link(path, filepath.Join(dir, rand.Text()))
}

// bareService sends an artifact from memory, and throws away what it gets.
type bareService struct {
	cachev1.UnimplementedArtifactServiceServer
	content []byte
	hash    string
}

// chunkSize is how many bytes are sent in a message, as the server that is measured does.
const chunkSize = 256 << 10

func serveGRPC(content []byte) error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	cachev1.RegisterArtifactServiceServer(server, &bareService{content: content, hash: fmt.Sprintf("%x", sha256.Sum256(content))})
	fmt.Fprintf(os.Stderr, "listening address=%s\n", listener.Addr())
	return server.Serve(listener)
}

func (s *bareService) GetArtifact(request *cachev1.GetArtifactRequest, stream grpc.ServerStreamingServer[cachev1.GetArtifactResponse]) error {
	info := &cachev1.Artifact{
		CacheKey:         request.GetCacheKey(),
		Hash:             s.hash,
		Size:             int64(len(s.content)),
		UncompressedSize: int64(len(s.content)),
		FileCount:        1,
		PackageName:      "bench",
		TaskName:         "bench",
		Command:          "polykit-cache bench",
		CreatedAt:        timestamppb.Now(),
		StoredAt:         timestamppb.Now(),
	}
	if err := stream.Send(&cachev1.GetArtifactResponse{Payload: &cachev1.GetArtifactResponse_Artifact{Artifact: info}}); err != nil {
		return err
	}
	for rest := s.content; len(rest) > 0; {
		n := min(len(rest), chunkSize)
		if err := stream.Send(&cachev1.GetArtifactResponse{Payload: &cachev1.GetArtifactResponse_Chunk{Chunk: rest[:n]}}); err != nil {
			return err
		}
		rest = rest[n:]
	}
	return nil
}

func (s *bareService) PutArtifact(stream grpc.ClientStreamingServer[cachev1.PutArtifactRequest, cachev1.PutArtifactResponse]) error {
	for {
		_, err := stream.Recv()
		if err == io.EOF {
			return stream.SendAndClose(&cachev1.PutArtifactResponse{Artifact: &cachev1.Artifact{}})
		}
		if err != nil {
			return err
		}
	}
}
