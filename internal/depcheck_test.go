package internal_test

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/polykit/polykit-cache/"

// mayImport says which packages of this module, and whether gRPC and OpenTelemetry, each package may import. Programs
// and tests may import any. Only they know what sends traces: the others know what says them.
var mayImport = map[string][]string{
	"gen/polykit/cache/v1": {"google.golang.org/grpc"},
	"internal/artifact":    nil,
	"internal/auth":        {"internal/artifact"},
	"internal/cache":       {"internal/artifact", "go.opentelemetry.io"},
	"internal/certs":       nil,
	"internal/disk":        {"internal/artifact", "internal/cache"},
	"internal/index":       {"internal/artifact", "internal/cache"},
	"internal/retention":   {"internal/artifact", "internal/cache", "internal/disk", "internal/index", "go.opentelemetry.io"},
	"internal/cachetest":   {"internal/artifact", "internal/cache"},
	"internal/metrics":     {"internal/artifact", "internal/auth", "internal/disk", "internal/index", "internal/retention"},
	"internal/server":      {"internal/artifact", "internal/auth", "internal/cache", "internal/disk", "internal/index", "internal/metrics", "internal/retention", "gen/polykit/cache/v1", "google.golang.org/grpc", "go.opentelemetry.io"},
	"internal/client":      {"internal/artifact", "gen/polykit/cache/v1", "google.golang.org/grpc"},
	"internal/load":        {"internal/artifact", "internal/client", "gen/polykit/cache/v1", "google.golang.org/grpc"},
}

// TestImports pins that imports point one way.
func TestImports(t *testing.T) {
	if err := filepath.WalkDir("..", func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entry.IsDir() && strings.HasPrefix(entry.Name(), ".") && path != ".." {
			return fs.SkipDir
		}
		if strings.HasSuffix(path, "_test.go") || filepath.Ext(path) != ".go" {
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil || file.Name.Name == "main" {
			return err
		}
		name, err := filepath.Rel("..", filepath.Dir(path))
		if err != nil {
			return err
		}
		allowed, known := mayImport[filepath.ToSlash(name)]
		if !known {
			t.Errorf("%s: say in mayImport what this package may import", path)
		}
		for _, spec := range file.Imports {
			imported, _ := strconv.Unquote(spec.Path.Value)
			imported, ours := strings.CutPrefix(imported, module)
			for _, other := range []string{"google.golang.org/grpc", "go.opentelemetry.io/otel/sdk", "go.opentelemetry.io/otel/exporters", "go.opentelemetry.io"} {
				if !ours && strings.HasPrefix(imported, other) {
					imported, ours = other, true
				}
			}
			if ours && !slices.Contains(allowed, imported) {
				t.Errorf("%s: must not import %s", path, imported)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}
